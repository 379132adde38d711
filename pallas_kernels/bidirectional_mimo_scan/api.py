"""The public op: signature, validation, dispatch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Complex, Float, Int

from pallas_kernels.bidirectional_mimo_scan import reference, scans, xla
from pallas_kernels.common import dispatch, segments, validate
from pallas_kernels.common.backend import Op, call_op
from pallas_kernels.linear_scan import gpu, tpu

_OP = "bidirectional_mimo_scan"
OP = Op(
    _OP,
    {
        "reference": reference.BACKEND,
        "xla": xla.BACKEND,
        "tpu": scans.between_products(tpu.BACKEND),
        "gpu": scans.between_products(gpu.BACKEND),
    },
    one_token=xla.one_token,
    outputs=("",),
)


def bidirectional_mimo_scan(
    u: Float[ArrayLike, "b l h"],
    decay: Complex[ArrayLike, " p"],
    input_projection: Float[ArrayLike, "h q"],
    output_projection: Float[ArrayLike, "2*q h"],
    *,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    implementation: dispatch.Implementation = None,
) -> Float[Array, "b l h"]:
    """A diagonal recurrence between two projections, both ways: bidirectional S5 and LRU.

    `h_t = a h_{t-1} + W u_t`, `g_t = a g_{t+1} + W u_t` and `y_t = Re(C1 h_t + C2 g_t)`. Smith,
    Warrington & Linderman, "Simplified State Space Layers for Sequence Modeling", ICLR 2023.

    There are four times as many state planes as channels, so on a CPU, where they are too many for
    its caches, most of the time goes into moving them: there `xla` takes both directions through
    blocks of time that do stay in the cache. Elsewhere it is two linear scans between products.

    Args:
      u: inputs `(B, L, H)`, float32; float64 is kept by `reference` and `xla`.
      decay: a, `(P,)` complex64 (complex128 for float64), the same at every step.
      input_projection: W as planes `[Re W, Im W]`, `(H, 2 P)` in `u`'s dtype.
      output_projection: `(4 P, H)` in `u`'s dtype: what the planes `[Re h, Im h, Re g, Im g]` give
        to the outputs, which is `[Re C1, -Im C1, Re C2, -Im C2]`.
      segment_ids: `(B, L)` int32, the document of each token; 0 is padding and stands only at the
        end of a row. State never crosses a change of id; the output of padding is 0.
      implementation: None, or a name or a sequence of names of `"reference" | "xla" | "tpu" |
        "gpu"`; see `dispatch.run`. The kernels are those of `linear_scan`.

    Returns:
      `y (B, L, H)` in `u`'s dtype.

    Gradients flow through all arrays but `segment_ids`. Forward mode and second derivatives:
    `implementation="reference"`.

    Raises:
      ValueError: a shape or dtype that does not fit; the message names the argument.
      NotImplementedError: a forced implementation cannot serve the arguments.
    """
    u, decay = jnp.asarray(u), jnp.asarray(decay)
    arrays = u, decay, jnp.asarray(input_projection), jnp.asarray(output_projection)
    _validate(*arrays, segment_ids)
    segment_index = None if segment_ids is None else segments.index(jnp.asarray(segment_ids))
    (y,) = call_op(
        OP, None, *arrays, segment_index, length=u.shape[1], implementation=implementation
    )
    return y


def _validate(
    u: jax.Array,
    decay: jax.Array,
    input_projection: jax.Array,
    output_projection: jax.Array,
    segment_ids: ArrayLike | None,
) -> None:
    validate.shape(_OP, "u", u, "(B, L, H)", (None, None, None))
    if any(size == 0 for size in u.shape):
        raise ValueError(f"{_OP}: u must not be empty, got shape {u.shape}")
    batch, length, width = u.shape
    validate.shape(_OP, "decay", decay, "(P,)", (None,))
    states = decay.shape[0]
    if states == 0:
        raise ValueError(f"{_OP}: decay must have at least one state, got shape {decay.shape}")
    sizes = (width, 2 * states)
    validate.shape(_OP, "input_projection", input_projection, "(H, 2 P)", sizes)
    sizes = (4 * states, width)
    validate.shape(_OP, "output_projection", output_projection, "(4 P, H)", sizes)
    validate.dtype(_OP, "u", u, ("float32", "float64"))
    because = f"u is {u.dtype}"
    state = "complex128" if u.dtype == jnp.float64 else "complex64"
    validate.dtype(_OP, "decay", decay, (state,), because=because)
    validate.dtype(_OP, "input_projection", input_projection, (u.dtype.name,), because=because)
    validate.dtype(_OP, "output_projection", output_projection, (u.dtype.name,), because=because)
    if segment_ids is not None:
        validate.segment_ids(_OP, segment_ids, batch, length)
