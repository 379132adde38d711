"""A diagonal recurrence between two projections: the core of causal S5 and LRU.

    h_t = a h_{t-1} + W u_t,   y_t = Re(C h_t)

Both ways at once it is an op of its own, ``ops.bidirectional_mimo_scan``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact

from seqmodels import ops
from seqmodels.segments import Segments, mask_padding

_dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)


def mimo_scan(
    u: Float[Array, "b l h"],
    decay: Complex[Array, " p"],
    input_projection: Float[Array, "h q"],
    output_projection: Float[Array, "q h"],
    segments: Segments | None,
    initial_state: Complex[Array, "b p"] | None,
) -> tuple[Float[Array, "b l h"], Complex[Array, "b p"]]:
    """``y``, unspecified on padding, and the last ``h``.

    Args:
      u: inputs, float32.
      decay: ``a``, the same at every step.
      input_projection: ``W`` as planes ``[re, im]``, ``q = 2 p``.
      output_projection: what the planes ``[re h, im h]`` give to the outputs, ``[Re C, -Im C]``:
        ``Re(C h) = Re C Re h - Im C Im h`` is one real product.
      segments: documents, which the recurrence does not cross.
      initial_state: that before the first token, None for zeros.
    """
    drive = jax.lax.complex(*jnp.split(_dot(u, input_projection), 2, axis=-1))
    h, final = recurrence(decay, drive, segments=segments, initial_state=initial_state)
    return _dot(jnp.concatenate([h.real, h.imag], axis=-1), output_projection), final


def recurrence(
    a: Inexact[Array, " d"],
    b: Inexact[Array, "b l d"],
    *,
    segments: Segments | None = None,
    initial_state: Inexact[Array, "b d"] | None = None,
    reverse: bool = False,
) -> tuple[Inexact[Array, "b l d"], Inexact[Array, "b d"]]:
    """``linear_scan`` that uses the promise of ``segments.single``.

    One document followed by padding needs no resets: with ``b`` zeroed on padding the reverse scan
    enters the document with a zero state, and the forward scan runs past its end, where outputs
    are *unspecified* (mixers mask theirs). The final state is that of the last real token.
    """
    if segments is None or not segments.single:
        return ops.linear_scan(
            a, b, initial_state=initial_state, segments=segments, reverse=reverse
        )
    b = mask_padding(b, segments)
    h, final = ops.linear_scan(a, b, initial_state=initial_state, reverse=reverse)
    if reverse:
        return h, final
    lengths = segments.lengths
    last = jnp.maximum(lengths - 1, 0)
    final = jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0]
    empty = jnp.zeros_like(final) if initial_state is None else initial_state
    return h, jnp.where(lengths[:, None] > 0, final, empty)
