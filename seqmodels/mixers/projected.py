"""A diagonal recurrence between two projections, one or both ways: the core of S5 and LRU.

    h_t = a h_{t-1} + W u_t,   g_t = a g_{t+1} + W u_t,   y_t = Re(C1 h_t + C2 g_t)

There are four times as many state planes as channels, so on a CPU, where they are too many for its
caches, most of the time goes into moving them. There each direction is taken through blocks of time
that do stay in the cache: project a block, scan it, read it out. The backward pass keeps the states
between blocks and does the rest again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from pallas_kernels import compat, vjp
from seqmodels.mixers.base import Segments, mask_padding, recurrence
from seqmodels.parallel.rows import over_rows

# State values, B * L * P. Measured on x86 with 2 cores, forward and backward: with fewer, scans are
# up to 1.6 times faster than blocks; with more, blocks are 1.1 to 1.3 times faster than scans.
_LARGE = 2**20

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
    steps = min(length, max(128, min(512, 2048 // batch)))  # measured: in the cache, few blocks
    x = jnp.moveaxis(jnp.pad(u, ((0, 0), (0, -length % steps), (0, 0))), 1, 0)
    x = x.reshape(-1, steps, batch, width)
    decay = (decay.real, decay.imag)
    left, right = jnp.split(readout, 2)
    x, *shared = compat.vary_alike(x, *decay, into, left, right)
    *shared, left, right = shared
    y = _one_way(_Way(reverse=False), x, *shared, left) + _one_way(
        _Way(reverse=True), x, *shared, right
    )
    return jnp.moveaxis(y.reshape(-1, batch, width), 0, 1)[:, :length]


# One direction. Time is first; a state is a pair of real planes (B, P), a block (T, B, 2P).


class _Way(NamedTuple):
    reverse: bool


def _loop(body, carry, inputs, *, reverse: bool):
    """`jax.lax.scan` whose carry is typed, under `jax.shard_map`, as what it will become."""
    like = jax.tree.leaves(inputs)[0]
    carry = jax.tree.map(lambda leaf: compat.vary_alike(leaf, like)[0], carry)
    return jax.lax.scan(body, carry, inputs, reverse=reverse)


def _scan(flow, state, decay, *, reverse: bool):
    """`(state after the last step, states)` of ``s_t = decay s_{t-1} + flow_t``."""
    re, im = decay
    flow = flow.reshape(*flow.shape[:-1], 2, -1)

    def step(state, x):
        a, b = state
        state = (re * a - im * b + x[:, 0], re * b + im * a + x[:, 1])
        return state, state

    state, planes = _loop(step, state, flow, reverse=reverse)
    return state, jnp.concatenate(planes, axis=-1)


def _zeros(x, width: int):
    zero = jnp.zeros((x.shape[2], width), x.dtype)
    return zero, zero


def _forward(way: _Way, x, re, im, into, readout):
    def block(state, x):
        after, planes = _scan(_dot(x, into), state, (re[None], im[None]), reverse=way.reverse)
        return after, (_dot(planes, readout), state)

    _, (y, entering) = _loop(block, _zeros(x, re.size), x, reverse=way.reverse)
    return y, (x, re, im, into, readout, entering)


def _backward(way: _Way, residuals: Any, dy):
    x, re, im, into, readout, entering = residuals
    decay, conjugate = (re[None], im[None]), (re[None], -im[None])

    def block(carry, inputs):
        dstate, ddecay, dinto, dreadout = carry
        x, dy, state = inputs
        _, planes = _scan(_dot(x, into), state, decay, reverse=way.reverse)
        first = jnp.concatenate(state, axis=-1)[None]
        pieces = [planes[1:], first] if way.reverse else [first, planes[:-1]]
        before = jnp.concatenate(pieces)
        dstate, dflow = _scan_back(_dot(dy, readout.T), dstate, conjugate, reverse=way.reverse)
        gradients = (_decay_gradient(dflow, before), _outer(x, dflow), _outer(planes, dy))
        sums = jax.tree.map(jnp.add, (ddecay, dinto, dreadout), gradients)
        return (dstate, *sums), _dot(dflow, into.T)

    zeros = (jnp.zeros((2 * re.size,), x.dtype), jnp.zeros_like(into), jnp.zeros_like(readout))
    carry = (_zeros(x, re.size), *zeros)
    (_, ddecay, dinto, dreadout), dx = _loop(
        block, carry, (x, dy, entering), reverse=not way.reverse
    )
    return dx, *jnp.split(ddecay, 2), dinto, dreadout


def _scan_back(dplanes, dstate, conjugate, *, reverse: bool):
    """Gradients of what flows into a block: ``s_t = conj(a) s_{t+1} + dplanes_t``.

    `dstate` is what the block's last state gets from behind, already decayed; so is what it returns
    for the block before.
    """
    re, im = conjugate
    flow = dplanes.reshape(*dplanes.shape[:-1], 2, -1)

    def step(behind, d):
        a, b = behind[0] + d[:, 0], behind[1] + d[:, 1]
        return (re * a - im * b, re * b + im * a), (a, b)

    dstate, planes = _loop(step, dstate, flow, reverse=not reverse)
    return dstate, jnp.concatenate(planes, axis=-1)


def _decay_gradient(dflow, before):
    """`[d re, d im]` ``(2P,)``: the sum of ``conj(before) dflow``, as a product (faster)."""
    (a, b), (c, d) = jnp.split(dflow, 2, axis=-1), jnp.split(before, 2, axis=-1)
    terms = jnp.concatenate([a * c + b * d, b * c - a * d], axis=-1)
    return _outer(jnp.ones((*terms.shape[:-1], 1), terms.dtype), terms)[0]


def _outer(x, y):
    """``x^T y`` over all tokens."""
    return _dot(x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]))


_one_way = vjp.join(lambda *args: _forward(*args)[0], _forward, _backward)
