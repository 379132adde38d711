"""A diagonal recurrence between two projections, one or both ways: the core of S5 and LRU.

    h_t = a h_{t-1} + W u_t,   g_t = a g_{t+1} + W u_t,   y_t = Re(C1 h_t + C2 g_t)

There are four times as many state planes as channels, so on a CPU, where they are too many for its
caches, most of the time goes into moving them. There each direction is taken through blocks of time
that do stay in the cache: project a block, scan it, read it out. The backward pass keeps the states
between blocks and does the rest again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from pallas_kernels.common import compat
from seqmodels.mixers.base import Segments, mask_padding, recurrence
from seqmodels.parallel.rows import over_rows

# State values, B * L * P. Measured on x86 with 2 cores, forward and backward: with fewer, scans are
# up to 1.6 times faster than blocks; with more, blocks are 1.1 to 1.3 times faster than scans.
_LARGE = 2**20

# Tokens a block, of all rows together; measured likewise, at 128 channels and 128 states.
_ROWS = 1024

_dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)


def both_ways(
    u: Float[Array, "b l h"],
    decay: Complex[Array, " p"],
    into: Float[Array, "h q"],
    readout: Float[Array, "2*q h"],
    segments: Segments | None,
) -> Float[Array, "b l h"]:
    """``y`` of the recurrences from the left and from the right; unspecified on padding.

    Args:
      u: inputs, float32.
      decay: ``a``, the same at every step.
      into: ``W`` as planes ``[re, im]``, ``q = 2 p``.
      readout: what the planes ``[re h, im h, re g, im g]`` give to the outputs.
      segments: documents, which the recurrences do not cross.
    """
    if segments is not None and not segments.single:
        return by_scans(u, decay, into, readout, segments)
    u = mask_padding(u, segments)
    if u.shape[0] * u.shape[1] * decay.size < _LARGE:
        return by_scans(u, decay, into, readout)
    return jax.lax.platform_dependent(
        u, decay, into, readout, cpu=by_blocks, default=functools.partial(by_scans, segments=None)
    )


def from_left(
    u: Float[Array, "b l h"],
    decay: Complex[Array, " p"],
    into: Float[Array, "h q"],
    readout: Float[Array, "q h"],
    segments: Segments | None,
    hidden: Complex[Array, "b p"] | None,
) -> tuple[Float[Array, "b l h"], Complex[Array, "b p"]]:
    """``y`` of the recurrence from the left alone, and the last ``h``.

    Args: as in ``both_ways``, ``readout`` for the planes ``[re h, im h]``; ``hidden`` is the state
    before the first token, None for zeros. ``Re(C h) = Re C Re h - Im C Im h`` is one real product
    with the rows ``[Re C, -Im C]``.
    """
    drive = jax.lax.complex(*jnp.split(_dot(u, into), 2, axis=-1))
    h, final = recurrence(decay, drive, segments=segments, hidden=hidden)
    return _dot(jnp.concatenate([h.real, h.imag], axis=-1), readout), final


def by_scans(u, decay, into, readout, segments=None):
    """`both_ways` as two scans of all of the time between two products."""
    drive = jax.lax.complex(*jnp.split(_dot(u, into), 2, axis=-1))
    states = [recurrence(decay, drive, segments=segments, reverse=r)[0] for r in (False, True)]
    return _dot(jnp.concatenate([z for h in states for z in (h.real, h.imag)], axis=-1), readout)


def by_blocks(u, decay, into, readout):
    """`both_ways` of rows of one document, block by block."""
    return over_rows(_by_blocks, [decay, into, readout], [u])


def _by_blocks(decay, into, readout, u):
    batch, length, width = u.shape
    steps = min(length, max(64, _ROWS // batch))
    x = jnp.moveaxis(jnp.pad(u, ((0, 0), (0, -length % steps), (0, 0))), 1, 0)
    x = x.reshape(-1, steps, batch, width)
    arrays = (x, decay.real, decay.imag, into, *jnp.split(readout, 2))
    y = _two_ways(*compat.match_vma(*arrays))
    return jnp.moveaxis(y.reshape(-1, batch, width), 0, 1)[:, :length]


# Time is first: a block is (T, B, H), and (T, B, 2P) before it is split into real and imaginary
# part; a state is a pair of planes (B, P).


def _loop(body, carry, inputs, *, reverse: bool):
    """`jax.lax.scan` whose carry is typed, under `jax.shard_map`, as what it will become."""
    like = jax.tree.leaves(inputs)[0]
    carry = jax.tree.map(lambda leaf: compat.match_vma(leaf, like)[0], carry)
    return jax.lax.scan(body, carry, inputs, reverse=reverse)


def _scan(flow, state, decay, *, reverse: bool):
    """`(state after the last step, states)` of ``s_t = decay s_{t-1} + flow_t``."""
    re, im = decay

    def step(state, x):
        a, b = state
        state = (re[None] * a - im[None] * b + x[:, 0], re[None] * b + im[None] * a + x[:, 1])
        return state, state

    return _loop(step, state, _parts(flow), reverse=reverse)


def _parts(x):
    """``(T, B, 2P)`` -> ``(T, B, 2, P)``."""
    return x.reshape(*x.shape[:-1], 2, -1)


def _zeros(x, decay):
    zero = jnp.zeros((x.shape[2], decay.size), x.dtype)
    return zero, zero


def _read(states, readout):
    """What the states give to the outputs; `readout` has the rows of the real parts first."""
    return sum(_dot(z, c) for z, c in zip(states, jnp.split(readout, 2), strict=True))


def _forward(x, re, im, into, left, right):
    def one_way(readout, reverse):
        def block(state, x):
            after, states = _scan(_dot(x, into), state, (re, im), reverse=reverse)
            return after, (_read(states, readout), state)

        return _loop(block, _zeros(x, re), x, reverse=reverse)[1]

    (y, entering), (z, returning) = one_way(left, False), one_way(right, True)
    return y + z, (x, re, im, into, left, right, entering, returning)


def _backward(residuals: Any, dy):
    """The way from the right first. What flows into its states, and what does into those of the
    other way, then go into the products for ``x`` and ``into`` as one sum."""
    x, re, im, into, left, right, entering, returning = residuals
    start = (_zeros(x, re), _zeros(x, re)), jnp.zeros_like(left)

    def through(carry, inputs, readout, *, reverse):
        (behind, dreadout), (x, dy, state) = carry, inputs
        _, states = _scan(_dot(x, into), state, (re, im), reverse=reverse)
        dstates = _dot(dy, readout.T)
        behind, dflow = _scan_back(dstates, states, behind, (re, -im), reverse=reverse)
        dreadout = dreadout + jnp.concatenate([_outer(z, dy) for z in states])
        return (behind, dreadout), dflow

    def from_the_right(carry, inputs):
        return through(carry, inputs, right, reverse=True)

    def from_the_left(carry, inputs):
        (ways, dinto), (x, dy, state, other) = carry, inputs
        ways, dflow = through(ways, (x, dy, state), left, reverse=False)
        dflow = jax.tree.map(jnp.add, dflow, other)
        dinto = dinto + jnp.concatenate([_outer(x, d) for d in dflow], axis=-1)
        return (ways, dinto), _read(dflow, into.T)

    ((_, ddecay), dright), flows = _loop(from_the_right, start, (x, dy, returning), reverse=False)
    (((_, other), dleft), dinto), dx = _loop(
        from_the_left, (start, jnp.zeros_like(into)), (x, dy, entering, flows), reverse=True
    )
    dre, dim = (jnp.sum(a + b, axis=0) for a, b in zip(ddecay, other, strict=True))
    return dx, dre, dim, dinto, dleft, dright


def _scan_back(dstates, states, behind, conjugate, *, reverse: bool):
    """Gradients of what flows into a block, ``d_t = conj(a) d_{t+1} + dstates_t``.

    Of `behind`, and of what is returned in its place for the block before, the first is the last
    ``d``, the second the sum of ``conj(states_t) d_{t+1}`` so far, the gradient of the decay.
    """
    re, im = conjugate

    def step(behind, inputs):
        (p, q), (dre, dim) = behind
        d, (a, b) = inputs
        ddecay = (dre + a * p + b * q, dim + a * q - b * p)
        now = (re[None] * p - im[None] * q + d[:, 0], re[None] * q + im[None] * p + d[:, 1])
        return (now, ddecay), now

    return _loop(step, behind, (_parts(dstates), states), reverse=not reverse)


def _outer(x, y):
    """``x^T y`` over all tokens."""
    return _dot(x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]))


@jax.custom_vjp
def _two_ways(x, re, im, into, left, right):
    return _forward(x, re, im, into, left, right)[0]


_two_ways.defvjp(_forward, _backward)
