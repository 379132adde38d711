"""A diagonal recurrence between two projections, one or both ways: the core of S5 and LRU.

    h_t = a h_{t-1} + W u_t,   g_t = a g_{t+1} + W u_t,   y_t = Re(C1 h_t + C2 g_t)

There are four times as many state planes as channels, so on a CPU, where they are too many for its
caches, most of the time goes into moving them. There both directions are taken through blocks of
time that do stay in the cache, see ``layers.mimo_blocks``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact

from pallas_kernels.common import dispatch, symbolic
from seqmodels import ops
from seqmodels.segments import Segments, mask_padding

# State values, B * L * P. Measured on x86 with 2 cores, forward and backward: with fewer, scans are
# up to 1.6 times faster than blocks; with more, blocks are 1.1 to 1.3 times faster than scans.
_LARGE = 2**20

_dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)


def bidirectional_mimo_scan(
    u: Float[Array, "b l h"],
    decay: Complex[Array, " p"],
    input_projection: Float[Array, "h q"],
    output_projection: Float[Array, "2*q h"],
    segments: Segments | None,
) -> Float[Array, "b l h"]:
    """``y`` of the recurrences from the left and from the right; unspecified on padding.

    Args:
      u: inputs, float32.
      decay: ``a``, the same at every step.
      input_projection: ``W`` as planes ``[re, im]``, ``q = 2 p``.
      output_projection: what the planes ``[re h, im h, re g, im g]`` give to the outputs.
      segments: documents, which the recurrences do not cross.
    """
    unsupported = {}
    if segments is not None and not segments.single:
        unsupported["blocks"] = "they take one document a row"
    else:
        u, segments = mask_padding(u, segments), None
        values = symbolic.known(u.shape[0] * u.shape[1] * decay.size, 0)
        if ops.splits(u.shape[1]):
            unsupported["blocks"] = "they take whole rows"
        elif values < _LARGE:
            unsupported["blocks"] = f"there are {values} state values, they pay from {_LARGE} on"
    return dispatch.choose(
        "bidirectional_mimo_scan",
        {"scans": functools.partial(by_scans, segments=segments), "blocks": ops.mimo_blocks},
        *(u, decay, input_projection, output_projection),
        default="scans",
        cpu="blocks",
        unsupported=unsupported,
    )


def mimo_scan(
    u: Float[Array, "b l h"],
    decay: Complex[Array, " p"],
    input_projection: Float[Array, "h q"],
    output_projection: Float[Array, "q h"],
    segments: Segments | None,
    initial_state: Complex[Array, "b p"] | None,
) -> tuple[Float[Array, "b l h"], Complex[Array, "b p"]]:
    """``y`` of the recurrence from the left alone, and the last ``h``.

    Args: as in ``bidirectional_mimo_scan``, ``output_projection`` for the planes ``[re h, im h]``;
    ``initial_state`` is that before the first token, None for zeros. ``Re(C h) = Re C Re h - Im C
    Im h`` is one real product with the rows ``[Re C, -Im C]``.
    """
    drive = jax.lax.complex(*jnp.split(_dot(u, input_projection), 2, axis=-1))
    h, final = recurrence(decay, drive, segments=segments, initial_state=initial_state)
    return _dot(jnp.concatenate([h.real, h.imag], axis=-1), output_projection), final


def by_scans(u, decay, input_projection, output_projection, segments=None):
    """`bidirectional_mimo_scan` as two scans of all of the time between two products."""
    drive = jax.lax.complex(*jnp.split(_dot(u, input_projection), 2, axis=-1))
    states = [recurrence(decay, drive, segments=segments, reverse=r)[0] for r in (False, True)]
    planes = [z for h in states for z in (h.real, h.imag)]
    return _dot(jnp.concatenate(planes, axis=-1), output_projection)


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
