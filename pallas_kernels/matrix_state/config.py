"""What is static about an op on matrix states, and the checks that all of them share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.common import segments, validate


class Config(NamedTuple):
    """What is static about a call.

    Attributes:
      scale: factor on the outputs.
      chunk: tokens that meet pairwise; None for what suits the backend.
      tiles: `matrix_state.tpu.Limits` on a TPU, the family's `Tiles` on a GPU; None for what suits.
    """

    scale: float
    chunk: int | None = None
    tiles: Any = None


def validate_arguments(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    initial_state: Any,
    segment_ids: Any,
    *,
    decay_shapes: tuple[str, ...],
) -> Any:
    """The dtype of the state; raises ValueError for what does not fit, in the name of `op`.

    `decay_shapes` are those of "(H,)", "(B, L, H)" and "(B, L, H, K)" that the op takes.
    """
    validate.shape(op, "v", v, "(B, L, H, V)", (None,) * 4)
    batch, length, heads, value_size = v.shape
    validate.shape(op, "q", q, "(B, L, G, K)", (batch, length, None, None))
    validate.shape(op, "k", k, "(B, L, G, K)", q.shape)
    groups, key_size = q.shape[2:]
    for name, x in (("q", q), ("v", v)):
        if 0 in x.shape:
            raise ValueError(f"{op}: {name} must not be empty, got shape {x.shape}")
    if heads % groups:
        raise ValueError(
            f"{op}: G must divide H, got q with G = {groups} and v with H = {heads}; repeat q and "
            "k, or choose another number of groups"
        )
    if max(key_size, value_size) > 256:
        raise ValueError(f"{op}: K and V go up to 256, got K = {key_size} and V = {value_size}")
    validate.dtype(op, "v", v, ("float32", "bfloat16", "float64"))
    because = f"v is {v.dtype}"
    for name, x in (("q", q), ("k", k)):
        validate.dtype(op, name, x, (v.dtype.name,), because)
    state_dtype = state_dtype_of(v)
    if log_decay is not None:
        full = (batch, length, heads, key_size)
        _validate_decay(op, log_decay, full, decay_dtypes(v), because, decay_shapes)
    if initial_state is not None:
        sizes = (batch, heads, key_size, value_size)
        validate.shape(op, "initial_state", initial_state, "(B, H, K, V)", sizes)
        validate.dtype(op, "initial_state", initial_state, (state_dtype.name,), because)
    if segment_ids is not None:
        validate.segment_ids(op, segment_ids, batch, length)
    return state_dtype


def state_dtype_of(v: Any) -> Any:
    """float64 for values in float64, else float32."""
    return jnp.dtype("float64" if v.dtype == jnp.float64 else "float32")


def decay_dtypes(v: Any) -> tuple[str, ...]:
    """What log decays and step sizes beside the values `v` may be."""
    wide = state_dtype_of(v).name
    return (wide, "bfloat16") if wide == "float32" else (wide,)


def _validate_decay(op, log_decay, full, dtypes, because, shapes) -> None:
    sizes = {"(H,)": full[2:3], "(B, L, H)": full[:3], "(B, L, H, K)": full}
    by_rank = {len(sizes[rule]): rule for rule in shapes}
    rules = f"{', '.join(shapes[:-1])} or {shapes[-1]}"
    if jnp.ndim(log_decay) not in by_rank:
        raise ValueError(f"{op}: log_decay must be {rules}, got shape {jnp.shape(log_decay)}")
    rule = by_rank[jnp.ndim(log_decay)]
    validate.shape(op, "log_decay", log_decay, rule, sizes[rule])
    validate.dtype(op, "log_decay", log_decay, dtypes, because)
    validate.at_most_zero(op, "log_decay", log_decay, validate.LOG_DECAY)


def row_decay(log_decay: Any, segment_index: Any, state: Any) -> Any:
    """What a row multiplies each key of an entering state by, `(B, H, K or 1, 1)` float32.

    Args:
      log_decay: None, `(B, L, H)` or `(B, L, H, K)`.
      segment_index: `(B, L)` int32 or None; the decay is 0 where a document begins inside the row.
      state: an array of the state's dtype and batch.
    """
    batch, heads = state.shape[:2]
    if log_decay is None:
        decay = jnp.ones((batch, heads, 1, 1), state.dtype)
    else:
        g = log_decay.astype(state.dtype)
        if segment_index is not None:
            real = (segment_index > 0).reshape(*segment_index.shape, *(1,) * (g.ndim - 2))
            g = jnp.where(real, g, jnp.zeros_like(g))
        decay = jnp.exp(jnp.sum(g, axis=1)).reshape(batch, heads, -1, 1)
    if segment_index is None:
        return decay
    restarts = jnp.any(segments.step_codes(segment_index) == segments.RESET, axis=1)
    return jnp.where(restarts[:, None, None, None], jnp.zeros_like(decay), decay)
