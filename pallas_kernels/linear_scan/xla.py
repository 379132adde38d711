"""The portable path: chunks in parallel, three short loops instead of one long one.

Length is cut into C chunks of T steps. All chunks are reduced to their maps `h -> A h + F` at once
(T steps), the maps are chained (C steps), and all chunks run again from the state that enters each
(T steps). Nothing but the output is written: on a CPU the scan costs two reads and a write.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments
from pallas_kernels.common.backend import Backend
from pallas_kernels.linear_scan import tile
from pallas_kernels.linear_scan.tile import Config

# A step of a loop costs about as much as touching this many numbers (measured on x86).
_MIN_CHUNK, _MAX_CHUNK = 8, 128


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How `(B, L, ...)` is cut: `count` chunks of `size` steps, `padding` of them added."""

    count: int
    size: int
    padding: int
    reverse: bool

    def cut(self, x: jax.Array) -> jax.Array:
        """`(B, L, ...) -> (B, C, T, ...)`, padded behind."""
        if self.padding:
            x = jnp.pad(x, ((0, 0), (0, self.padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], self.count, self.size, *x.shape[2:])

    def uncut(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], self.count * self.size, *x.shape[3:])
        return x[:, : x.shape[1] - self.padding] if self.padding else x

    def step(self, i: int | jax.Array) -> int | jax.Array:
        """The place in its chunk of the i-th step in the direction of travel."""
        return self.size - 1 - i if self.reverse else i


def chunk_size(length: int) -> int:
    """Steps per chunk: about the fewest loop steps, with `length` cut evenly if it can be."""
    sizes = range(min(_MIN_CHUNK, length), min(_MAX_CHUNK, length) + 1)

    def cost(size: int) -> float:
        count = -(-length // size)
        uneven = 0.0 if count * size == length else length / 8
        return 2 * size + count + uneven

    return min(sizes, key=cost)


def _chunks(length: int, *, reverse: bool) -> _Chunks:
    size = chunk_size(length)
    count = -(-length // size)
    return _Chunks(count, size, count * size - length, reverse)


def _codes(segment_index, length: int, chunks: _Chunks, *, reverse: bool):
    """Step codes cut into chunks, `(B, C, T, 1)`, or None where every step is a plain one."""
    if segment_index is None and not chunks.padding:
        return None
    if segment_index is None:
        segment_index = jnp.ones((1, length), jnp.int32)
    codes = segments.step_codes(segment_index, reverse=reverse)
    codes = jnp.pad(codes, ((0, 0), (0, chunks.padding)), constant_values=segments.SKIP)
    return codes.reshape(codes.shape[0], chunks.count, chunks.size, 1)


def _at(x, t, dtype=None):
    """Step t of every chunk: `(B, C, T, ...) -> (B, C, ...)`; `(1, 1, D)` and None pass."""
    if x is None:
        return None
    if x.ndim > 3:
        x = jax.lax.dynamic_index_in_dim(x, t, 2, keepdims=False)
    return x if dtype is None else x.astype(dtype)


def _put(x, value, t):
    return jax.lax.dynamic_update_index_in_dim(x, value.astype(x.dtype)[:, :, None], t, 2)


def _loop(chunks: _Chunks, body, carry, steps: int | None = None):
    """`body(t, carry)` over the steps of the chunks in the direction of travel."""
    steps = chunks.size if steps is None else steps
    return jax.lax.fori_loop(0, steps, lambda i, c: body(chunks.step(i), c), carry)


def _full(fill: int, shape, dtype, like):
    """A constant to begin a loop with, typed under `jax.shard_map` as what it will become."""
    return compat.match_vma(jnp.full(shape, fill, dtype), like)[0]


def _cut_decay(a, chunks: _Chunks):
    """`(B, C, T, D)`, or `(1, 1, D)` for one decay for all steps."""
    return a[None, None] if a.ndim == 1 else chunks.cut(a)


def _chunk_decay(a, codes, chunks: _Chunks, shape, dtype):
    """The product of the decays of each chunk, `(B, C, D)`, or `(1, 1, D)` if all are alike."""
    if a.ndim == 3 and codes is None:
        return a.astype(dtype) ** chunks.size

    def body(t, product):
        return tile.compose((product,), (_at(a, t, dtype),), _at(codes, t))[0]

    return _loop(chunks, body, _full(1, shape, dtype, a))


def _advance(a, b, codes, t, h):
    """Step t of every chunk."""
    dtype = h.dtype
    return tile.advance((h,), (_at(a, t, dtype),), (_at(b, t, dtype),), _at(codes, t))[0]


def _entering(decay, flow, initial, *, reverse: bool):
    """Chain the chunks' maps: the state that enters each, `(B, C, D)`, and the one that leaves."""
    decay = jnp.broadcast_to(decay, flow.shape)

    def step(h, chunk):
        decay, flow = chunk
        # A chunk with a reset has decay 0 and keeps nothing of h, not even an infinity.
        return jnp.where(decay == 0, flow, decay * h + flow), h

    maps = (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(flow, 1, 0))
    final, entering = jax.lax.scan(step, initial, maps, reverse=reverse)
    return jnp.moveaxis(entering, 0, 1), final


def forward(config: Config, a, b, initial_state, segment_index, *, return_residuals: bool):
    """`(h, final_state)`, and what `backward` reads; arguments as in `reference.forward`."""
    batch, length, width = b.shape
    reverse, uncut_a = config.reverse, a
    chunks = _chunks(length, reverse=reverse)
    dtype = initial_state.dtype
    codes = _codes(segment_index, length, chunks, reverse=reverse)
    b = chunks.cut(b)
    a = _cut_decay(a, chunks)
    shape = (batch, chunks.count, width)

    advance = functools.partial(_advance, a, b, codes)
    flow = _loop(chunks, advance, _full(0, shape, dtype, b))
    decay = _chunk_decay(a, codes, chunks, shape, dtype)
    entering, final_state = _entering(decay, flow, initial_state, reverse=reverse)

    def write(t, carry):
        h, out = carry
        h = advance(t, h)
        code = _at(codes, t)
        visible = h if code is None else jnp.where(code == segments.SKIP, jnp.zeros_like(h), h)
        return h, _put(out, visible, t)

    _, h = _loop(chunks, write, (entering, _full(0, b.shape, b.dtype, b)))
    h = chunks.uncut(h)
    return (h, final_state), (
        uncut_a,
        h,
        initial_state,
        segment_index,
    ) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """`(da, db, dinitial_state, None)` from the cotangents of `forward`'s outputs."""
    (a, h, initial_state, segment_index), (dh, dfinal_state), reverse = (
        residuals,
        cotangents,
        config.reverse,
    )
    batch, length, width = h.shape
    chunks = _chunks(length, reverse=not reverse)
    dtype = initial_state.dtype
    codes = _codes(segment_index, length, chunks, reverse=reverse)
    h, dh = chunks.cut(h), chunks.cut(dh)
    constant = a.ndim == 1
    a_cut = _cut_decay(a, chunks)
    shape = (batch, chunks.count, width)

    def retreat(t, c):
        gradient, before = tile.retreat(
            (c,), (_at(a_cut, t, dtype),), (_at(dh, t, dtype),), _at(codes, t)
        )
        return gradient[0], before[0]

    flow = _loop(chunks, lambda t, c: retreat(t, c)[1], _full(0, shape, dtype, dh))
    decay = _chunk_decay(a_cut, codes, chunks, shape, dtype)
    c, dinitial_state = _entering(decay, flow, dfinal_state, reverse=not reverse)

    def write(t, carry, h_before):
        c, da, db = carry
        code = _at(codes, t)
        gradient, c = retreat(t, c)
        h_before = tile.state_before((h_before,), (initial_state[:, None],), code)
        step_da = tile.decay_gradient((gradient,), h_before, code)[0]
        da = da + step_da if constant else _put(da, step_da, t)
        return c, da, _put(db, gradient, t)

    towards_start = 1 if reverse else -1

    def inside(t, carry):
        return write(t, carry, _at(h, t + towards_start, dtype))

    da = _full(0, shape, dtype, dh) if constant else _full(0, a_cut.shape, a.dtype, dh)
    carry = (c, da, _full(0, dh.shape, dh.dtype, dh))
    carry = _loop(chunks, inside, carry, steps=chunks.size - 1)
    # The first step of a chunk follows the last of its neighbour.
    borders = [initial_state[:, None], _at(h, chunks.step(0), dtype)]
    borders = [borders[1][:, 1:], borders[0]] if reverse else [borders[0], borders[1][:, :-1]]
    last = chunks.step(chunks.size - 1)
    _, da, db = write(last, carry, jnp.concatenate(borders, axis=1))
    da = da.sum((0, 1)) if constant else chunks.uncut(da)
    return da.astype(a.dtype), chunks.uncut(db), dinitial_state, None


def one_token(config: Config, a, b, initial_state, segment_index):
    """A decoding step: no loops; JAX differentiates it."""
    dtype = initial_state.dtype
    a = jnp.broadcast_to(a, b.shape)[:, 0].astype(dtype)
    h = a * initial_state + b[:, 0].astype(dtype)
    if segment_index is None:
        return h[:, None].astype(b.dtype), h
    padding = segment_index == 0
    visible = jnp.where(padding, jnp.zeros_like(h), h)
    return visible[:, None].astype(b.dtype), jnp.where(padding, initial_state, h)


BACKEND = Backend(forward, backward)
