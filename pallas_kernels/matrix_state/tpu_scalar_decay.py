"""Decays in TPU kernels where all keys of a head decay alike, or nothing decays.

What tokens need of their heads' decays are rows and columns made once for all heads of a step,
exponentials included; rows are `(heads, C)`, tokens in the lanes. Sums run over slabs of 8 tokens,
not over the blocks of `decay_sums.scan`: a decay between two tokens is then one product of a column
and a row of their slabs, where the scan's log C sizes of blocks would need a `(C, C)` selection and
an exponential each, for every head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.matrix_state import decay_sums, masks, tile
from pallas_kernels.matrix_state.tile import dot
from pallas_kernels.matrix_state.tpu import SLAB, rows_shape


class Decays(NamedTuple):
    """The decays of the heads of a step, or of one; None where nothing decays.

    Attributes:
      slab: `(C, heads)`, from the start of its slab up to the token, inclusive.
      from_start: `(heads, C)`; 0 where a token does not see the entering state, scaled as outputs
        are.
      to_end: `(heads, C)`; 0 where a token is not in the leaving state.
      to_end_column: the same `(C, heads)`.
      chunk_decay: `(heads, 1)`.
    """

    slab: jax.Array | None
    from_start: jax.Array
    to_end: jax.Array
    to_end_column: jax.Array
    chunk_decay: jax.Array | None

    def head(self, h: int) -> Decays:
        slab = None if self.slab is None else self.slab[:, h : h + 1]
        chunk_decay = None if self.chunk_decay is None else self.chunk_decay[h : h + 1]
        to_end_column = self.to_end_column[:, h : h + 1]
        return Decays(
            slab, self.from_start[h : h + 1], self.to_end[h : h + 1], to_end_column, chunk_decay
        )


class StepMasks(NamedTuple):
    """`masks.SegmentMasks` as it is, and with a row for each of its columns."""

    down: masks.SegmentMasks
    across: masks.SegmentMasks


def segment_masks(dims, refs) -> StepMasks | None:
    if not dims.segmented:
        return None
    column, row, run = (refs[name][...] for name in ("column", "row", "entering_segment"))
    down = masks.segment_masks(column, row, run)
    leaving_segment = jnp.maximum(run, row.max(axis=1, keepdims=True))
    across = down._replace(real=row > 0, entering=row == run, leaving=row == leaving_segment)
    return StepMasks(down, across)


def slab_sums(g: jax.Array, roll) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
    """Sums of log decays `(heads, C)` over what lies between slabs of 8 tokens, and inside them.

    Nothing is subtracted; see `decay_sums`.

    Returns:
      before: for each slab, and for the end of the chunk, `(heads, C)`: after token j up to the
        slab's start; 0 where j is not before it.
      inside: for each place r in a slab, `(heads, C)`: after token j up to place r of j's own
        slab, inclusive; 0 where j is not before it.
      prefix: from its slab's start up to the token, inclusive.
      start: from the chunk's start to the token's slab.
    """
    size = g.shape[1]
    token = jax.lax.broadcasted_iota(jnp.int32, g.shape, 1)
    place, slab = token & (SLAB - 1), token >> 3
    after = [jnp.zeros_like(g)]
    for u in range(1, SLAB):
        after.append(after[-1] + roll(g, size - u, 1))
    inside = []
    for r in range(SLAB):
        sums = jnp.zeros_like(g)
        for m in range(r):
            sums = jnp.where(place == m, after[r - m], sums)
        inside.append(sums)
    prefix = g
    for s in (1, 2, 4):
        prefix = prefix + jnp.where(place >= s, roll(prefix, s, 1), 0.0)
    before, start, so_far = [jnp.zeros_like(g)], jnp.zeros_like(g), jnp.zeros_like(g[:, :1])
    for n in range(size // SLAB):
        total = prefix[:, (n + 1) * SLAB - 1 : (n + 1) * SLAB]
        start = jnp.where(slab == n, so_far, start)
        later = jnp.where(slab == n, inside[-1], before[-1] + total)
        before.append(jnp.where(slab <= n, later, 0.0))
        so_far = so_far + total
    return before, inside, prefix, start


def decays(dims, refs, docs: StepMasks | None) -> Decays:
    """`Decays` of the heads of a step; writes what is between slabs and inside them to `refs`."""
    across = None if docs is None else docs.across
    slab = chunk_decay = None
    if dims.decay is None:
        from_start = out = jnp.ones(rows_shape(dims), jnp.float32)
    else:
        g = decay_sums.clamp(refs["g"][...], across)
        before, inside, prefix, start = slab_sums(g, compat.tpu.roll)
        for ref, sums in ((refs["before"], before[:-1]), (refs["inside"], inside)):
            for i, x in enumerate(sums):
                ref[i] = jnp.exp(x)
        from_start, out, slab = jnp.exp(start + prefix), jnp.exp(before[-1]), jnp.exp(prefix).T
        chunk_decay = from_start[:, -1:]
        starts = dims.scale * jnp.exp(start)
        for i in range(dims.tiles.chunk // SLAB):
            first = starts[:, i * SLAB : i * SLAB + 1]
            refs["start"][i] = jnp.broadcast_to(first, refs["start"].shape[1:])
    from_start, out = (
        tile.where_entering(dims.scale * from_start, across),
        tile.where_leaving(out, across),
    )
    return Decays(slab, from_start, out, out.T, chunk_decay)


def pair_decay(dims, refs, decay: Decays, h: int) -> jax.Array | None:
    """The decays between tokens of one head, `(C, C)`; what is above the diagonal is finite."""
    if decay.slab is None:
        return None
    size = dims.tiles.chunk
    inside = refs["inside"][:, h, :][None]
    row = jax.lax.broadcasted_iota(jnp.int32, (size // SLAB, SLAB, size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, row.shape, 2) >> 3
    product = by_slab(decay.slab, refs["before"][:, h : h + 1, :])
    return jnp.where(row == column, inside, product).reshape(size, size)


def by_slab(slab: jax.Array, rows: jax.Array) -> jax.Array:
    """A column `(C, 1)` times a row of each slab, `(C / 8, 1, N) -> (C / 8, 8, N)`."""
    return slab.reshape(-1, SLAB, 1) * rows


def log_decay_vjp(refs, docs: StepMasks | None, each: Sequence[Any]) -> None:
    """Gradients of the log decays of a step's heads: sums over later tokens and over earlier ones.

    `each` head has the `dg`, `dg_cumsum` and `dg_to_end` of `_HeadGradients`.
    """
    g = refs["g"][...]
    row, size = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0), g.shape[1]
    rest = from_start = out = jnp.zeros_like(g)
    for h, d in enumerate(each):
        rest = jnp.where(row == h, d.dg, rest)
        from_start = jnp.where(row == h, d.dg_cumsum, from_start)
        out = jnp.where(row == h, d.dg_to_end, out)
    token, other = masks.token_indices(size)
    across = None if docs is None else docs.across
    # Tokens that see the entering state all come first, and those in the leaving one last: masks
    # of the sums keep documents apart.
    from_start = tile.where_entering(
        dot(from_start, (token >= other).astype(jnp.float32), "nn"), across
    )
    out = tile.where_leaving(dot(out, (token < other).astype(jnp.float32), "nn"), across)
    refs["dg"][...] = decay_sums.clamp_vjp(g, from_start + out + rest, across)
