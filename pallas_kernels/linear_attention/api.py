"""The public op: signature, validation, dispatch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels.common import dispatch, segments
from pallas_kernels.common.backend import Op, call_op
from pallas_kernels.linear_attention import gpu, reference, tpu, xla
from pallas_kernels.matrix_state.config import Config, row_decay, validate_arguments
from pallas_kernels.matrix_state.decode import one_token


def _summary(run, config: Config, q, k, v, log_decay, initial_state, segment_index):
    """`(decay, state)`, `(B, H, K or 1, 1)` and `(B, H, K, V)`; see `backend.summarize`."""
    _, state = run(config, q, k, v, log_decay, initial_state, segment_index)
    return row_decay(log_decay, segment_index, state), state


_OP = "linear_attention"
OP = Op(
    _OP,
    {
        "reference": reference.BACKEND,
        "xla": xla.BACKEND,
        "tpu": tpu.BACKEND,
        "gpu": gpu.BACKEND,
    },
    one_token=one_token,
    summary=_summary,
)


def linear_attention(
    q: Float[ArrayLike, "b l g k"],
    k: Float[ArrayLike, "b l g k"],
    v: Float[ArrayLike, "b l h v"],
    log_decay: Float[ArrayLike, " h"] | Float[ArrayLike, "b l h *k"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[ArrayLike, "b h k v"] | None = None,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "b l h v"], Float[Array, "b h k v"]]:
    """Attention without softmax, as a recurrence over a matrix state for each head.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    With `g` a log decay per key this is GLA (Yang et al. 2024) and HGRN2; per head and step, SSD
    (Mamba-2, Dao & Gu 2024); constant per head, RetNet (Sun et al. 2023) and Lightning
    Attention-2; None, plain linear attention (Katharopoulos et al. 2020).

    Args:
      q, k: queries and keys `(B, L, G, K)`, float32 or bfloat16. Head h reads group `h // (H / G)`.
      v: values `(B, L, H, V)`, `q`'s dtype; G divides H; K and V up to 256.
      log_decay: None, `(H,)`, `(B, L, H)` or `(B, L, H, K)`, at most 0; float32 (recommended) or
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
      token.

    Matmuls take operands of `q`'s dtype and sum in float32; decays and states are float32.
    Gradients flow through every array and both outputs. Forward mode and second derivatives:
    `implementation="reference"`.

    Raises:
      ValueError: a shape, dtype or value that does not fit; the message names the argument. Values
        are looked at in arrays on the host or the CPU backend; in traced arrays and on accelerators
        by `checked`.
      NotImplementedError: a forced implementation cannot serve the arguments.
    """
    config, arrays = _arguments(q, k, v, log_decay, scale, initial_state, segment_ids)
    length = arrays[0].shape[1]
    o, final_state = call_op(OP, config, *arrays, length=length, implementation=implementation)
    return o, final_state


def entering(
    q: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    *,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """What a state that enters a row adds to its outputs, `(B, L, H, V)` float32.

    `scale exp(g_1 + ... + g_t) S^T q_t` in the first document: outputs from `initial_state` are
    those from zero plus this. JAX differentiates it.

    Args:
      q, log_decay, scale, segment_ids: as in `linear_attention`.
      initial_state: S, `(B, H, K, V)` float32.
    """
    heads, key_size = initial_state.shape[1:3]
    scale = float(key_size**-0.5 if scale is None else scale)
    read = jnp.repeat(q.astype(initial_state.dtype), heads // q.shape[2], axis=2)
    if log_decay is not None:
        g = log_decay.astype(initial_state.dtype)
        if g.ndim == 1:
            g = jnp.broadcast_to(g, read.shape[:3])
        decay = jnp.exp(jnp.cumsum(g, axis=1))
        read = read * (decay if g.ndim == 4 else decay[..., None])
    first = None
    if segment_ids is not None:
        first = (segment_ids == segment_ids[:, :1]) & (segment_ids != 0)
        first = jnp.cumprod(first.astype(jnp.int32), axis=1)[:, :, None, None] != 0
        read = jnp.where(first, read, jnp.zeros_like(read))
    o = jnp.einsum("blhk,bhkv->blhv", read * scale, initial_state, precision="highest")
    # Twice: what overflows in the first document is not multiplied by the zeros of others.
    return o if first is None else jnp.where(first, o, jnp.zeros_like(o))


def _arguments(
    q, k, v, log_decay, scale, initial_state, segment_ids
) -> tuple[Config, tuple[Any, ...]]:
    """The op's config and arrays."""
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    state_dtype = validate_arguments(
        _OP,
        *(q, k, v, log_decay, initial_state, segment_ids),
        decay_shapes=("(H,)", "(B, L, H)", "(B, L, H, K)"),
    )
    batch, length, heads, value_size = v.shape
    if log_decay is not None:
        log_decay = jnp.asarray(log_decay)
        if log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, (batch, length, heads))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, q.shape[3], value_size), state_dtype)
    segment_index = None if segment_ids is None else segments.index(jnp.asarray(segment_ids))
    config = Config(float(q.shape[3] ** -0.5 if scale is None else scale))
    return config, (q, k, v, log_decay, initial_state, segment_index)
