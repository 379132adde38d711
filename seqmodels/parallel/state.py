"""The state that enters each shard of a row whose length is split over devices.

What shard r does to any state that enters it is a map ``S -> A_r S + b_r``, its *summary*: ``A`` is
a decay for each element, or a matrix over keys (the delta rule). Of these maps every shard needs
those before it, chained:

    S_0 = initial state,   S_{r+1} = A_r S_r + b_r

Nothing of this grows with the length. Backward is the same recurrence in the other direction, with
transposed maps: ``E_{P-1} = 0``, ``E_{r-1} = g_r + A_r^T E_r`` for the cotangents ``g_r`` of
``S_r``; then ``db_r = E_r`` and ``dA_r = E_r S_r^T``. Only ``A_r`` and ``S_r`` are kept for it.

Everything here is called inside `jax.shard_map`, on the arrays of one shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from pallas_kernels.common import compat


class _Exchange(NamedTuple):
    """What is static: the mesh axis and its size, the strategy, and the maps' kind.

    ``matrix``: A is ``(B, H, K, K)``. ``reverse``: from the last shard to the first.
    """

    axis: str
    size: int
    strategy: str
    matrix: bool
    reverse: bool

    @property
    def order(self) -> Array:
        """This shard's place in the direction of travel, from 0."""
        rank = jax.lax.axis_index(self.axis)
        return self.size - 1 - rank if self.reverse else rank

    def send(self, *parts: Array, hops: int = 1) -> tuple[Array, ...]:
        """What the shard ``hops`` before this one has; zeros where there is none."""
        step = -hops if self.reverse else hops
        pairs = [(i, i + step) for i in range(self.size) if 0 <= i + step < self.size]
        return _together(lambda x: jax.lax.ppermute(x, self.axis, pairs), *parts)

    def stops(self, decay: Array) -> Array:
        """Where nothing of the entering state is left, whatever it holds."""
        return jnp.all(decay == 0, axis=(-2, -1), keepdims=True) if self.matrix else decay == 0

    def product(self, decay: Array, state: Array) -> Array:
        """``A S``. A select where A is 0: not even an infinity of another document gets through."""
        if self.matrix:
            through = jnp.matmul(decay, state, precision=jax.lax.Precision.HIGHEST)
        else:
            through = decay * state
        return jnp.where(self.stops(decay), jnp.zeros_like(through), through)

    def transposed(self, decay: Array) -> Array:
        """``A^T``."""
        return jnp.swapaxes(decay, -2, -1) if self.matrix else decay


def entering_state(
    decay: Inexact[Array, "b *d"],
    state: Inexact[Array, "b *s"],
    initial_state: Inexact[Array, "b *s"],
    *,
    axis: str,
    size: int,
    strategy: str,
    matrix: bool = False,
    reverse: bool = False,
) -> Inexact[Array, "b *s"]:
    """The state that enters this shard.

    Args:
      decay: A of this shard; ``(B, H, K, K)`` if ``matrix``, else what broadcasts to ``state``. It
        is 0 where no state gets through.
      state: b of this shard, float32, or complex64.
      initial_state: of the row, the same on all shards.
      axis, size: the mesh axis that the length is split over, and its number of shards.
      strategy: one of ``STRATEGIES``.
      matrix: whether A is a matrix over the keys of ``state (B, H, K, V)``.
      reverse: whether the initial state enters the last shard.
    """
    exchange = _Exchange(axis, size, strategy, matrix, reverse)
    arrays = (decay, state, initial_state, jax.lax.axis_index(axis))
    return _enter(exchange, *compat.match_vma(*arrays)[:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(exchange: _Exchange, decay: Array, state: Array, initial: Array) -> Array:
    first = exchange.order == 0
    # The first shard leaves what it makes of the row's initial state: the others' maps begin at 0.
    state = jnp.where(first, exchange.product(decay, initial) + state, state)
    return jnp.where(first, initial, STRATEGIES[exchange.strategy](exchange, decay, state))


def _enter_forward(exchange, decay, state, initial):
    entering = _enter(exchange, decay, state, initial)
    return entering, (decay, entering)


def _enter_backward(exchange, residuals, cotangent):
    decay, entering = residuals
    back = exchange.transposed(decay)
    returning = exchange._replace(reverse=not exchange.reverse)
    leaving = _enter(returning, back, cotangent, jnp.zeros_like(cotangent))
    if exchange.matrix:
        pairs = jnp.einsum("bhiv,bhjv->bhij", leaving, entering, precision="highest")
    else:
        pairs = leaving * entering
        narrow = [i for i, n in enumerate(decay.shape) if n != pairs.shape[i]]
        pairs = jnp.sum(pairs, axis=narrow, keepdims=True)
    initial = cotangent + exchange.product(back, leaving)
    initial = jnp.where(exchange.order == 0, initial, jnp.zeros_like(initial))
    return pairs, leaving, initial


_enter.defvjp(_enter_forward, _enter_backward)


def _all_gather(exchange: _Exchange, decay: Array, state: Array) -> Array:
    """One collective of all maps, which every shard folds (LASP-2, Sun et al. 2025)."""
    decays, states = _together(lambda x: jax.lax.all_gather(x, exchange.axis), decay, state)
    order = exchange.order

    def fold(i: Any, entering: Array) -> Array:
        shard = exchange.size - 1 - i if exchange.reverse else i
        own, left = (
            jax.lax.dynamic_index_in_dim(x, shard, keepdims=False) for x in (decays, states)
        )
        return jnp.where(i < order, exchange.product(own, entering) + left, entering)

    return jax.lax.fori_loop(0, exchange.size - 1, fold, _zeros(state))


def _doubling(exchange: _Exchange, decay: Array, state: Array) -> Array:
    """``1 + log2(P - 1)`` hops (Hillis and Steele 1986): after each, twice as many shards' maps."""
    span = 1  # shards whose maps are chained in (decay, state)
    if exchange.size <= 2:
        return exchange.send(state)[0]
    decay, state = exchange.send(decay, state)
    while 2 * span < exchange.size - 1:
        before, left = exchange.send(decay, state, hops=span)
        state = exchange.product(decay, left) + state
        decay = exchange.product(decay, before)
        span *= 2
    (left,) = exchange.send(state, hops=span)
    return exchange.product(decay, left) + state


def _chain(exchange: _Exchange, decay: Array, state: Array) -> Array:
    """From each shard to the next, in pieces of the state that follow each other (LASP, Sun et al.
    2024; in pieces: ZeCO, Chou et al. 2025). It moves the fewest bytes, in the most hops."""
    width = state.shape[-1]
    count = max(n for n in range(1, exchange.size + 1) if width % n == 0)
    states = _pieces(state, count)
    each = not exchange.matrix and decay.shape[-1] == width
    decays = _pieces(decay, count) if each else decay[None]
    order = exchange.order

    def at(x: Array, piece: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, jnp.clip(piece, 0, len(x) - 1), keepdims=False)

    def tick(t: Any, entering: Array) -> Array:
        out = t - order  # the piece that this shard passes on; the one before it is one ahead
        passed = exchange.product(at(decays, out), at(entering, out)) + at(states, out)
        (received,) = exchange.send(passed)
        into = out + 1
        place = jnp.clip(into, 0, count - 1)
        updated = jax.lax.dynamic_update_index_in_dim(entering, received, place, 0)
        return jnp.where((into >= 0) & (into < count), updated, entering)

    entering = jax.lax.fori_loop(0, exchange.size + count - 2, tick, _zeros(states))
    return jnp.moveaxis(entering, 0, -2).reshape(state.shape)


STRATEGIES: dict[str, Callable[[_Exchange, Array, Array], Array]] = {
    "all_gather": _all_gather,
    "doubling": _doubling,
    "chain": _chain,
}
"""By name, what chains the maps: ``(exchange, A, b) -> S``, anything on the first shard."""


def _zeros(like: Array) -> Array:
    return compat.match_vma(jnp.zeros_like(like), like)[0]


def _pieces(x: Array, count: int) -> Array:
    """``(..., D)`` as ``(count, ..., D / count)``."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], count, -1), -2, 0)


def _together(move: Callable[[Array], Array], *parts: Array) -> tuple[Array, ...]:
    """``move(part)`` of all ``parts (B, ...)`` by one collective, of real numbers."""
    planes = [p for x in parts for p in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    flat = [p.reshape(p.shape[0], -1) for p in planes]
    moved = move(jnp.concatenate(flat, axis=1))
    ends = [sum(p.shape[1] for p in flat[: i + 1]) for i in range(len(flat) - 1)]
    pieces = iter(jnp.split(moved, ends, axis=-1))

    def whole(x: Array) -> Array:
        shape = (*moved.shape[:-2], *x.shape)
        if jnp.iscomplexobj(x):
            return jax.lax.complex(next(pieces).reshape(shape), next(pieces).reshape(shape))
        return next(pieces).reshape(shape)

    return tuple(whole(x) for x in parts)
