"""The public op: signature, validation, dispatch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from pallas_kernels import compat, dispatch, segments, symbolic, validate
from pallas_kernels.delta_rule import gpu, reference, tpu, xla
from pallas_kernels.delta_rule.config import Config

_OP = "delta_rule"


def delta_rule(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    beta: ArrayLike,
    log_decay: ArrayLike | None = None,
    *,
    scale: float | None = None,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
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
    q, k, v, beta = (jnp.asarray(x) for x in (q, k, v, beta))
    state_dtype = _validate(q, k, v, beta, log_decay, initial_state, segment_ids)
    batch, length, heads, value_size = v.shape
    if log_decay is not None:
        log_decay = jnp.asarray(log_decay)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, q.shape[3], value_size), state_dtype)
    runs = None if segment_ids is None else segments.runs(jnp.asarray(segment_ids))
    if length == 1 and implementation is None:
        implementation = "xla"  # decoding: one step needs no kernel
    config = Config(float(q.shape[3] ** -0.5 if scale is None else scale))
    implementations = {"reference": reference, "xla": xla, "tpu": tpu, "gpu": gpu}
    o, final_state = dispatch.run(
        _OP,
        {
            name: functools.partial(module.delta_rule, config)
            for name, module in implementations.items()
        },
        *compat.vary_alike(q, k, v, beta, log_decay, initial_state, runs),
        requested=implementation,
        refusals=_refusals(q, v, log_decay),
    )
    return checkpoint_name(o, _OP), checkpoint_name(final_state, f"{_OP}_state")


def _validate(q, k, v, beta, log_decay, initial_state, segment_ids) -> Any:
    """The dtype of the state."""
    validate.shape(_OP, "v", v, "(B, L, H, V)", (None,) * 4)
    batch, length, heads, value_size = v.shape
    validate.shape(_OP, "q", q, "(B, L, G, K)", (batch, length, None, None))
    validate.shape(_OP, "k", k, "(B, L, G, K)", q.shape)
    validate.shape(_OP, "beta", beta, "(B, L, H)", (batch, length, heads))
    groups, key_size = q.shape[2:]
    for name, x in (("q", q), ("v", v)):
        if x.size == 0:
            raise ValueError(f"{_OP}: {name} must not be empty, got shape {x.shape}")
    if heads % groups:
        raise ValueError(
            f"{_OP}: G must divide H, got q with G = {groups} and v with H = {heads}; repeat q and "
            "k, or choose another number of groups"
        )
    if max(key_size, value_size) > 256:
        raise ValueError(f"{_OP}: K and V go up to 256, got K = {key_size} and V = {value_size}")
    validate.dtype(_OP, "v", v, ("float32", "bfloat16", "float64"))
    because = f"v is {v.dtype}"
    for name, x in (("q", q), ("k", k)):
        validate.dtype(_OP, name, x, (v.dtype.name,), because)
    wide = "float64" if v.dtype == jnp.float64 else "float32"
    narrow = ("bfloat16",) if wide == "float32" else ()
    validate.dtype(_OP, "beta", beta, (wide, *narrow), because)
    if log_decay is not None:
        by_key = (key_size,) if jnp.ndim(log_decay) == 4 else ()
        sizes = (batch, length, heads, *by_key)
        validate.shape(_OP, "log_decay", log_decay, "(B, L, H) or (B, L, H, K)", sizes)
        validate.dtype(_OP, "log_decay", log_decay, (wide, *narrow), because)
        validate.at_most_zero(_OP, "log_decay", log_decay, validate.LOG_DECAY)
    if initial_state is not None:
        sizes = (batch, heads, key_size, value_size)
        validate.shape(_OP, "initial_state", initial_state, "(B, H, K, V)", sizes)
        validate.dtype(_OP, "initial_state", initial_state, (wide,), because)
    if segment_ids is not None:
        validate.segment_ids(_OP, segment_ids, batch, length)
    return jnp.dtype(wide)


def _refusals(q: Any, v: Any, log_decay: Any) -> dict[str, str]:
    if v.dtype == jnp.float64:
        wide = "it has no float64; reference and xla do"
        return {"tpu": wide, "gpu": wide}
    largest = functools.partial(gpu.largest_array, q, v, log_decay)
    return symbolic.gpu_refusals(v.shape[0], "an array", largest)
