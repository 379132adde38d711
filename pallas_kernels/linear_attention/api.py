"""The public op: signature, validation, dispatch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from pallas_kernels import compat, dispatch, segments, symbolic, validate
from pallas_kernels.linear_attention import gpu, reference, tpu, xla
from pallas_kernels.linear_attention.config import Config

_OP = "linear_attention"


def linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    log_decay: ArrayLike | None = None,
    *,
    scale: float | None = None,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
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
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    state_dtype = _validate(q, k, v, log_decay, initial_state, segment_ids)
    batch, length, heads, value_size = v.shape
    if log_decay is not None:
        log_decay = jnp.asarray(log_decay)
        if log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, (batch, length, heads))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, q.shape[3], value_size), state_dtype)
    runs = None if segment_ids is None else segments.runs(jnp.asarray(segment_ids))
    if length == 1 and implementation is None:
        implementation = "xla"  # decoding: one step needs no kernel
    config = Config(float(q.shape[3] ** -0.5 if scale is None else scale))
    arrays = compat.vary_alike(q, k, v, log_decay, initial_state, runs)
    o, final_state = dispatch.run(
        _OP,
        {
            "reference": functools.partial(reference.linear_attention, config),
            "xla": functools.partial(xla.linear_attention, config),
            "tpu": functools.partial(tpu.linear_attention, config),
            "gpu": functools.partial(gpu.linear_attention, config),
        },
        *arrays,
        requested=implementation,
        refusals=_refusals(q, v, log_decay),
    )
    return checkpoint_name(o, _OP), checkpoint_name(final_state, f"{_OP}_state")


def _validate(q, k, v, log_decay, initial_state, segment_ids) -> Any:
    """The dtype of the state."""
    validate.shape(_OP, "v", v, "(B, L, H, V)", (None,) * 4)
    batch, length, heads, value_size = v.shape
    validate.shape(_OP, "q", q, "(B, L, G, K)", (batch, length, None, None))
    validate.shape(_OP, "k", k, "(B, L, G, K)", q.shape)
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
    for name, x in (("q", q), ("k", k)):
        validate.dtype(_OP, name, x, (v.dtype.name,), because=f"v is {v.dtype}")
    wide = "float64" if v.dtype == jnp.float64 else "float32"
    if log_decay is not None:
        _validate_decay(log_decay, (batch, length, heads, key_size), wide, v)
    if initial_state is not None:
        sizes = (batch, heads, key_size, value_size)
        validate.shape(_OP, "initial_state", initial_state, "(B, H, K, V)", sizes)
        validate.dtype(_OP, "initial_state", initial_state, (wide,))
    if segment_ids is not None:
        validate.segment_ids(_OP, segment_ids, batch, length)
    return jnp.dtype(wide)


def _validate_decay(log_decay, full: tuple[int, ...], wide: str, v) -> None:
    allowed = {1: (full[2:3], "(H,)"), 3: (full[:3], "(B, L, H)"), 4: (full, "(B, L, H, K)")}
    if jnp.ndim(log_decay) not in allowed:
        raise ValueError(
            f"{_OP}: log_decay must be (H,), (B, L, H) or (B, L, H, K), got shape "
            f"{jnp.shape(log_decay)}"
        )
    sizes, rule = allowed[jnp.ndim(log_decay)]
    validate.shape(_OP, "log_decay", log_decay, rule, sizes)
    validate.dtype(_OP, "log_decay", log_decay, (wide, "bfloat16"), because=f"v is {v.dtype}")
    validate.at_most_zero(_OP, "log_decay", log_decay, validate.LOG_DECAY)


def _refusals(q: Any, v: Any, log_decay: Any) -> dict[str, str]:
    if v.dtype == jnp.float64:
        wide = "it has no float64; reference and xla do"
        return {"tpu": wide, "gpu": wide}
    largest = functools.partial(gpu.largest_array, q, v, log_decay)
    return symbolic.gpu_refusals(v.shape[0], "an array", largest)
