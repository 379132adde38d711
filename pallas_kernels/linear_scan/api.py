"""The public op: signature, validation, dispatch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact, Int

from pallas_kernels.common import dispatch, segments, validate
from pallas_kernels.common.backend import Op, call_op, summarize
from pallas_kernels.linear_scan import gpu, reference, tile, tpu, xla
from pallas_kernels.linear_scan.tile import Config

_OP = "linear_scan"
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


def linear_scan(
    a: Inexact[ArrayLike, " d"] | Inexact[ArrayLike, "b l d"],
    b: Inexact[ArrayLike, "b l d"],
    *,
    initial_state: Inexact[ArrayLike, "b d"] | None = None,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    reverse: bool = False,
    implementation: dispatch.Implementation = None,
) -> tuple[Inexact[Array, "b l d"], Inexact[Array, "b d"]]:
    """The diagonal recurrence `h_t = a_t * h_{t-1} + b_t` (LRU, S5, RG-LRU, Mamba's core).

    Args:
      a: decays, `(B, L, D)`, or `(D,)` when they do not change; float32 or bfloat16 for a real `b`
        (float32 recommended), complex64 for a complex one.
      b: inputs `(B, L, D)`; float32, bfloat16 or complex64. float64 and complex128 are kept by
        `reference` and `xla`.
      initial_state: the state before the first token, `(B, D)` float32 (complex64, or `b`'s own
        dtype if that is wider); zeros if None. It belongs to the row's first document.
      segment_ids: `(B, L)` int32, the document of each token; 0 is padding and stands only at the
        end of a row. State never crosses a change of id; padding leaves it untouched and its
        output is 0.
      reverse: run from the last real token to the first: the initial state enters at the last,
        the final state is the one after token 0.
      implementation: None, or a name or a sequence of names of `"reference" | "xla" | "tpu" |
        "gpu"`; see `dispatch.run`.

    Returns:
      `h (B, L, D)` in `b`'s dtype and `final_state (B, D)` in the state's dtype: the state after
      the last real token (`initial_state` for a row of padding).

    Gradients flow through `a`, `b`, `initial_state` and both outputs. Forward mode and second
    derivatives: `implementation="reference"`.

    Raises:
      ValueError: a shape or dtype that does not fit; the message names the argument.
      NotImplementedError: a forced implementation cannot serve the arguments.
    """
    config, arrays = _arguments(a, b, initial_state, segment_ids, reverse)
    length = arrays[1].shape[1]
    h, final_state = call_op(OP, config, *arrays, length=length, implementation=implementation)
    return h, final_state


def summary(
    a: ArrayLike,
    b: ArrayLike,
    *,
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
    implementation: dispatch.Implementation = None,
) -> tuple[Array, Array]:
    """What each row does to a state, `(decay, state)`, both `(B, D)`; see `backend.summarize`."""
    config, arrays = _arguments(a, b, None, segment_ids, reverse)
    return summarize(OP, config, *arrays, implementation=implementation)


def _arguments(a, b, initial_state, segment_ids, reverse) -> tuple[Config, tuple[Any, ...]]:
    """The op's config and arrays."""
    a, b = jnp.asarray(a), jnp.asarray(b)
    state_dtype = _validate(a, b, initial_state, segment_ids)
    if initial_state is None:
        initial_state = jnp.zeros((b.shape[0], b.shape[2]), state_dtype)
    segment_index = None if segment_ids is None else segments.index(jnp.asarray(segment_ids))
    return Config(reverse), (a, b, initial_state, segment_index)


def _validate(a, b, initial_state, segment_ids) -> Any:
    """The dtype of the state."""
    validate.shape(_OP, "b", b, "(B, L, D)", (None, None, None))
    if any(size == 0 for size in b.shape):
        raise ValueError(f"{_OP}: b must not be empty, got shape {b.shape}")
    batch, length, width = b.shape
    if a.ndim == 1:
        validate.shape(_OP, "a", a, "(D,)", (width,))
    else:
        validate.shape(_OP, "a", a, "(B, L, D) or (D,)", (batch, length, width))
    numbers = ("float32", "bfloat16", "complex64", "float64", "complex128")
    validate.dtype(_OP, "b", b, numbers)
    state_dtype = jnp.dtype(jnp.float32) if b.dtype == jnp.bfloat16 else b.dtype
    allowed = (state_dtype.name, "bfloat16") if state_dtype == jnp.float32 else (state_dtype.name,)
    validate.dtype(_OP, "a", a, allowed, because=f"b is {b.dtype}")
    if initial_state is not None:
        validate.shape(_OP, "initial_state", initial_state, "(B, D)", (batch, width))
        validate.dtype(_OP, "initial_state", initial_state, (state_dtype.name,))
    if segment_ids is not None:
        validate.segment_ids(_OP, segment_ids, batch, length)
    return state_dtype
