"""Sums of log decays inside a chunk of C tokens, on values, for every backend.

Log decays are summed in aligned blocks of s = 1, 2, 4, ... tokens. A later token i and an earlier
token j part at one s: i is in the second half of a block of 2s and j in the first. The decay
between them is

    exp(sum of the half's tokens up to i) exp(sum of the half's tokens after j)

two exponentials of sums of non-positive numbers. Nothing is ever subtracted, so an extreme decay
takes no digits from its neighbours; and the sums that a pair needs run only over tokens between
the two, so documents are kept apart by masks alone.

`scan` makes the sums, or the products of decays, of all sizes of blocks at once; `xla`, the TPU
kernels with a decay per key and linear attention's GPU kernels with one share it. Three backends
have sums of their own, and say why: `tpu_scalar_decay`, `gpu.pair_sums` and `delta_rule.gpu_tile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.matrix_state.masks import SegmentMasks, level_sizes

# exp(MIN_LOG_DECAY) is 0 in float32; what lies below is clamped, its gradient is 0.
MIN_LOG_DECAY = -104.0


class DecaySums(NamedTuple):
    """Sums of log decays in a chunk of C tokens, of `N` kinds.

    Attributes:
      level_sums: for each s of `level_sizes(C)`, `(C, N)`: of a token in the second half of its
        block of 2s the half's sum up to the token, inclusive; of one in the first half, that after
        it.
      g_cumsum: `(C, N)`, from the chunk's start up to the token, inclusive.
      g_to_end: `(C, N)`, after the token up to the chunk's end.
      g_last: `(1, N)`, of the whole chunk.
    """

    level_sums: list[jax.Array]
    g_cumsum: jax.Array
    g_to_end: jax.Array
    g_last: jax.Array


class Summation(NamedTuple):
    """A way to sum: `cumsum(g (C, N)) -> DecaySums`, and `cumsum_vjp(DecaySums) -> dg`.

    `g` is non-positive, float32 or float64; C is a power of two.
    """

    cumsum: Callable[[jax.Array], DecaySums]
    cumsum_vjp: Callable[[DecaySums], jax.Array]


class Exchange(NamedTuple):
    """How the halves of blocks see each other where a kernel cannot cut arrays into halves.

    Attributes:
      other_half: `(x, y, s) -> (x of the token s before, y of the token s after)`, all `(C, N)`;
        what the first is in first halves and the second in second halves does not matter.
      below: the size from which on halves are cut; None where they never can be.
    """

    other_half: Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]
    below: int | None = None

    def serves(self, s: int) -> bool:
        return self.below is None or s < self.below


def by_rolls(roll: Callable[[jax.Array, int, int], jax.Array], below: int | None) -> Exchange:
    """Exchange by `jnp.roll`, or what a kernel has in its place."""
    return Exchange(lambda x, y, s: (roll(x, s, 0), roll(y, y.shape[0] - s, 0)), below)


def halves(x: jax.Array, s: int) -> tuple[jax.Array, jax.Array]:
    """First and second halves of the blocks of 2s tokens of `x (C, N)`, each `(C / 2s, s, N)`."""
    x = x.reshape(-1, 2, s, x.shape[1])
    return x[:, 0], x[:, 1]


def joined(first: jax.Array, second: jax.Array) -> jax.Array:
    """The inverse of `halves`; stacked, so that XLA sees through `halves` of it."""
    return jnp.stack([first, second], axis=1).reshape(-1, first.shape[2])


def scan(
    x: jax.Array,
    exchange: Exchange | None = None,
    op: Callable[[jax.Array, jax.Array], jax.Array] = jnp.add,
    identity: float = 0.0,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """`(level_sums, g_cumsum, g_to_end)` of `DecaySums`, in log C steps.

    Args:
      x: `(C, N)`, log decays; or decays, to be multiplied.
      exchange: None to cut halves at all sizes.
      op, identity: the operation, and what changes nothing.
    """
    prefix, suffix, levels = x, jnp.full_like(x, identity), []
    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for s in level_sizes(x.shape[0]):
        if exchange is not None and exchange.serves(s):
            later, total = token & s != 0, op(prefix, suffix)
            levels.append(jnp.where(later, prefix, suffix))
            before, after = exchange.other_half(total, total, s)
            prefix = op(prefix, jnp.where(later, before, identity))
            suffix = op(suffix, jnp.where(later, identity, after))
        else:
            first, second = halves(prefix, s), halves(suffix, s)
            levels.append(joined(second[0], first[1]))
            # The whole of a half: its last token's sum from the start.
            whole = [half[:, s - 1 :] for half in first]
            prefix = joined(first[0], op(first[1], whole[0]))
            suffix = joined(op(second[0], whole[1]), second[1])
    return levels, prefix, suffix


def scan_vjp(
    dlevels: list[jax.Array],
    dprefix: jax.Array,
    dsuffix: jax.Array,
    exchange: Exchange | None = None,
) -> jax.Array:
    """The gradient of `g (C, N)` from those of its sums; of products, from their logarithms'."""
    token = jax.lax.broadcasted_iota(jnp.int32, dprefix.shape, 0)
    for s, level in zip(reversed(level_sizes(dprefix.shape[0])), reversed(dlevels), strict=True):
        if exchange is not None and exchange.serves(s):
            later = token & s != 0
            # The sum of a half is in all prefixes of the later half, or all suffixes of the
            # earlier one; it is a token's prefix and suffix, whichever token's.
            dtotal = jnp.where(later, *exchange.other_half(dsuffix, dprefix, s))
            dprefix = dprefix + dtotal + jnp.where(later, level, 0.0)
            dsuffix = dsuffix + dtotal + jnp.where(later, 0.0, level)
        else:
            (p0, p1), (s0, s1), (l0, l1) = (halves(x, s) for x in (dprefix, dsuffix, level))
            dprefix = joined(p0 + p1, p1 + s0 + l1)
            dsuffix = joined(s0 + p1 + l0, s1 + s0)
    return dprefix


def summation(exchange: Exchange | None) -> Summation:
    """Sums by `scan`."""

    def cumsum(g: jax.Array) -> DecaySums:
        levels, prefix, suffix = scan(g, exchange)
        cut = exchange is None or exchange.below is not None
        return DecaySums(levels, prefix, suffix, prefix[-1:] if cut else g.sum(0, keepdims=True))

    def cumsum_vjp(sums: DecaySums) -> jax.Array:
        dg = scan_vjp(sums.level_sums, sums.g_cumsum, sums.g_to_end, exchange)
        return dg + jnp.broadcast_to(sums.g_last, dg.shape)

    return Summation(cumsum, cumsum_vjp)


BY_HALVES = summation(None)
"""For the portable path: a CPU is 1.2 to 1.4 times faster with additions of halves, forward and
backward through an op, than with products with matrices of zeros and ones."""


def finite_or_large(x: jax.Array) -> jax.Array:
    """`x` with what is not finite made huge, for a product with a matrix of zeros and ones.

    Zero times infinity would carry one document's overflow into the next; this stays in its own.
    """
    return jnp.where(jnp.isfinite(x), x, 1e38)


def clamp(g: jax.Array, docs: SegmentMasks | None) -> jax.Array:
    """Log decays `(C, N)` ready to be summed: above `MIN_LOG_DECAY`, 0 on padding."""
    g = jnp.maximum(g, MIN_LOG_DECAY)
    return g if docs is None else jnp.where(docs.real, g, 0.0)


def clamp_vjp(g: jax.Array, dg: jax.Array, docs: SegmentMasks | None) -> jax.Array:
    """The gradient of `g` from that of `clamp(g)`."""
    live = g > MIN_LOG_DECAY
    return jnp.where(live if docs is None else live & docs.real, dg, 0.0)
