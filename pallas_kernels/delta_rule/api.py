"""The public op: signature, validation, dispatch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels.common import dispatch, segments, validate
from pallas_kernels.common.backend import Op, call_op, summarize
from pallas_kernels.delta_rule import gpu, reference, tile, tpu, xla
from pallas_kernels.matrix_state.config import Config, decay_dtypes, validate_arguments

_OP = "delta_rule"
OP = Op(
    _OP,
    {
        "reference": reference.BACKEND,
        "xla": xla.BACKEND,
        "tpu": tpu.BACKEND,
        "gpu": gpu.BACKEND,
    },
    one_token=xla.one_token,
    summary=tile.summary,
)


def delta_rule(
    q: Float[ArrayLike, "b l g k"],
    k: Float[ArrayLike, "b l g k"],
    v: Float[ArrayLike, "b l h v"],
    beta: Float[ArrayLike, "b l h"],
    log_decay: Float[ArrayLike, "b l h *k"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[ArrayLike, "b h k v"] | None = None,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "b l h v"], Float[Array, "b h k v"]]:
    """A matrix state that replaces, in part, what it holds under a key by a new value.

    For each head, with the state decayed before it is corrected:

        S'  = diag(exp(g_t)) S_{t-1}
        S_t = S' + beta_t k_t (v_t - S'^T k_t)^T        o_t = scale * S_t^T q_t

    Without decay this is DeltaNet (Yang et al. 2024, arXiv:2406.06484); with one per head, Gated
    DeltaNet (Yang et al. 2024, arXiv:2412.06464, eq. 10); with one per key, Kimi Delta Attention
    (Kimi Team 2025, arXiv:2510.26692).

    Keys should have norm 1 and beta lie in [0, 1], or up to 2 for eigenvalues down to -1. What the
    op needs is `beta_t |k_t|^2 <= 2`: then no state ever grows through a correction, and chunks
    compute what the recurrence does to rounding. Beyond, the state grows as the recurrence has it,
    exponentially where nothing decays; rounding errors grow with it, and what overflows comes out
    as infinity or NaN, in its own document only.

    Args:
      q, k: queries and keys `(B, L, G, K)`, `v`'s dtype. Head h reads group `h // (H / G)`.
      v: values `(B, L, H, V)`, float32 or bfloat16; G divides H; K and V up to 256.
      beta: how much of the old value is replaced, `(B, L, H)`; float32 or bfloat16.
      log_decay: None, `(B, L, H)` or `(B, L, H, K)`, at most 0; float32 (recommended) or
        bfloat16. Below -104 it is -104: the decay is 0 in float32.
      scale: factor on the outputs; `K**-0.5` if None.
      initial_state: the state before the first token, `(B, H, K, V)` float32; zeros if None. It
        belongs to the row's first document.
      segment_ids: `(B, L)` int32, the document of each token; 0 is padding and stands only at the
        end of a row. State never crosses a change of id; padding leaves it untouched and its
        output is 0.
      implementation: None, or a name or a sequence of names of `"reference" | "xla" | "tpu" |
        "gpu"`; see `dispatch.run`. `reference` and `xla` take and keep float64 too.

    Returns:
      `o (B, L, H, V)` in `v`'s dtype, and `final_state (B, H, K, V)`: the state after the last real
      token (`initial_state` for a row of padding).

    Decays, states and the solution of a chunk's corrections are float32. Gradients flow through
    every array but `segment_ids`, and through both outputs. Forward mode and second derivatives:
    `implementation="reference"`.

    Raises:
      ValueError: a shape, dtype or value that does not fit; the message names the argument. Values
        are looked at in arrays on the host or the CPU backend; in traced arrays and on accelerators
        by `checked`.
      NotImplementedError: a forced implementation cannot serve the arguments.
    """
    config, arrays = _arguments(q, k, v, beta, log_decay, scale, initial_state, segment_ids)
    length = arrays[0].shape[1]
    o, final_state = call_op(OP, config, *arrays, length=length, implementation=implementation)
    return o, final_state


def summary(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    beta: ArrayLike,
    log_decay: ArrayLike | None = None,
    *,
    segment_ids: ArrayLike | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """What each row does to a state: `decay (B, H, K, K)`, a matrix over keys, and `state
    (B, H, K, V)`; see `backend.summarize`. It does not depend on `q`."""
    config, arrays = _arguments(q, k, v, beta, log_decay, None, None, segment_ids)
    return summarize(OP, config, *arrays, implementation=implementation)


def _arguments(
    q, k, v, beta, log_decay, scale, initial_state, segment_ids
) -> tuple[Config, tuple[Any, ...]]:
    """The op's config and arrays."""
    q, k, v, beta = (jnp.asarray(x) for x in (q, k, v, beta))
    state_dtype = validate_arguments(
        _OP,
        *(q, k, v, log_decay, initial_state, segment_ids),
        decay_shapes=("(B, L, H)", "(B, L, H, K)"),
    )
    batch, length, heads, value_size = v.shape
    validate.shape(_OP, "beta", beta, "(B, L, H)", (batch, length, heads))
    validate.dtype(_OP, "beta", beta, decay_dtypes(v), f"v is {v.dtype}")
    if log_decay is not None:
        log_decay = jnp.asarray(log_decay)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, q.shape[3], value_size), state_dtype)
    segment_index = None if segment_ids is None else segments.index(jnp.asarray(segment_ids))
    config = Config(float(q.shape[3] ** -0.5 if scale is None else scale))
    return config, (q, k, v, beta, log_decay, initial_state, segment_index)
