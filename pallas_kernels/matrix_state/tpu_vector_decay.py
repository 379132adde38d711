"""Decays and intra-chunk scores in TPU kernels where each key of a head decays for itself.

The decay between two tokens is a product of two factors for each key, one of the queries' side
and one of the keys', that depend on the size of the aligned blocks at which the two part; see
`decay_sums`. Here the factors themselves are multiplied up a binary tree instead of their
logarithms: each is at most 1, nothing is divided, and a token needs one exponential a key. States
are `(V, K)`, so that the decays of keys are rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.matrix_state import decay_sums, masks, tile
from pallas_kernels.matrix_state.decay_sums import Exchange, halves, joined
from pallas_kernels.matrix_state.tile import dot, zero_where_not
from pallas_kernels.matrix_state.tpu import SLAB, lanes


class Factors(NamedTuple):
    """Exponentials of `decay_sums.DecaySums`; `from_start` scaled as outputs are."""

    level_factors: list[jax.Array]
    from_start: jax.Array
    to_end: jax.Array
    chunk_decay: jax.Array


def _exchange(roll) -> Exchange:
    """Rolls inside the registers of a slab, whole registers beyond."""
    return decay_sums.by_rolls(roll, below=SLAB)


def factors(a: jax.Array, scale: float, roll) -> Factors:
    """`Factors` of decays `a (C, K)` in (0, 1]; `roll` as in `decay_sums.by_rolls`."""
    levels, prefix, suffix = decay_sums.scan(a, _exchange(roll), jnp.multiply, 1.0)
    return Factors(levels, scale * prefix, suffix, prefix[a.shape[0] - 1 :])


def log_gradient(dlevels, dg_cumsum: jax.Array, dg_to_end: jax.Array, roll) -> jax.Array:
    """The gradient of `log(a)`, `(C, K)`, from those of the logarithms of `Factors`."""
    return decay_sums.scan_vjp(dlevels, dg_cumsum, dg_to_end, _exchange(roll))


class _Side(NamedTuple):
    """The rows of a level's queries, which are second halves, or of its keys, first halves.

    Where halves are smaller than a slab, all rows are taken; masks of pairs do the rest.
    """

    s: int
    second: bool

    def take(self, x: jax.Array) -> jax.Array:
        if self.s < SLAB:
            return x
        return halves(x, self.s)[self.second].reshape(-1, x.shape[1])

    def put(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """`x` with these rows."""
        if self.s < SLAB:
            return rows
        first, second = halves(x, self.s)
        rows = rows.reshape(first.shape)
        return joined(first, rows) if self.second else joined(rows, second)


def _both(s: int, earlier: jax.Array, later: jax.Array) -> jax.Array:
    """What the rows of both sides of a level give to its factors, `(C, K)`."""
    if s < SLAB:
        return earlier + later
    width = earlier.shape[1]
    return joined(earlier.reshape(-1, s, width), later.reshape(-1, s, width))


class Step(NamedTuple):
    """What all heads of a step share.

    Attributes:
      mask: pairs that meet.
      level: `(C, C)` int32, how often a size of blocks doubles before the pair is in one block;
        -1 where `mask` is not.
    """

    docs: masks.SegmentMasks | None
    mask: jax.Array
    level: jax.Array


def step_of(dims, refs) -> Step:
    docs, size = None, dims.tiles.chunk
    if dims.segmented:
        docs = masks.segment_masks(
            *(refs[name][...] for name in ("column", "row", "entering_segment"))
        )
    row, column = masks.token_indices(size)
    level = sum(((row ^ column) >= s).astype(jnp.int32) for s in masks.level_sizes(size))
    mask = tile.causal(size, docs)
    return Step(docs, mask, jnp.where(mask, level, -1))


class Head(NamedTuple):
    """One head in one chunk, wide."""

    q: jax.Array
    k: jax.Array
    decay: Factors
    scale: float

    def A(self, step: Step, dtype) -> jax.Array:
        """`A (C, C)`, scaled as outputs are."""
        on_diagonal = (self.q * self.k).sum(1, keepdims=True)
        A = zero_where_not(step.level == 0, jnp.broadcast_to(on_diagonal, step.level.shape))
        for n, (s, factor) in enumerate(self.levels()):
            later, earlier = _Side(s, True), _Side(s, False)
            q = later.take(self.q) * later.take(factor)
            k = earlier.put(self.k, earlier.take(self.k) * earlier.take(factor))
            met = dot(q.astype(dtype), k.astype(dtype), "nt")
            kept = jnp.where(later.take(step.level) > n, met, later.take(A))
            A = later.put(A, kept)
        return self.scale * A

    def A_vjp(self, step: Step, dA, dtype):
        """`(dq, dk, dlevels)` from the gradient of `A`; `dlevels` of the logarithms."""
        across, across_level, dlevels = dA.T, step.level.T, []
        on_diagonal = self.scale * zero_where_not(step.level == 0, dA).sum(1, keepdims=True)
        dq, dk = on_diagonal * self.k, on_diagonal * self.q
        for n, (s, factor) in enumerate(self.levels()):
            later, earlier = _Side(s, True), _Side(s, False)
            q, k = later.take(self.q), earlier.take(self.k)
            for_q, for_k = later.take(factor), earlier.take(factor)
            met_q = later.put(self.q, q * for_q).astype(dtype)
            met_k = earlier.put(self.k, k * for_k).astype(dtype)
            part = self.scale * zero_where_not(later.take(step.level) == n + 1, later.take(dA))
            part_across = zero_where_not(earlier.take(across_level) == n + 1, earlier.take(across))
            # Only tokens of second halves have a row in it, only those of first halves a column.
            into_q = for_q * dot(part.astype(dtype), met_k, "nn")
            into_k = for_k * dot((self.scale * part_across).astype(dtype), met_q, "nn")
            dq = later.put(dq, later.take(dq) + into_q)
            dk = earlier.put(dk, earlier.take(dk) + into_k)
            dlevels.append(_both(s, k * into_k, q * into_q))
        return dq, dk, dlevels

    def levels(self):
        """Sizes of half blocks, and the factors of the pairs that part there."""
        return zip(masks.level_sizes(self.q.shape[0]), self.decay.level_factors, strict=True)

    def from_state(self, step: Step, dtype) -> jax.Array:
        """Queries as they meet the entering state."""
        return (self.q * tile.where_entering(self.decay.from_start, step.docs)).astype(dtype)

    def to_state(self, step: Step, dtype) -> jax.Array:
        """Keys as they are in the leaving state."""
        return (self.k * tile.where_leaving(self.decay.to_end, step.docs)).astype(dtype)


def head_of(dims, refs, step: Step, group: int, h: int) -> Head:
    q, k = (lanes(refs[name], group, dims.key_size)[...].astype(jnp.float32) for name in "qk")
    g = lanes(refs["g"], h, dims.key_size)[...].astype(jnp.float32)
    a = jnp.exp(decay_sums.clamp(g, step.docs))
    return Head(q, k, factors(a, dims.scale, compat.tpu.roll), dims.scale)
