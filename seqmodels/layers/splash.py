"""Softmax attention by splash, JAX's attention kernel for TPUs.

Splash takes masks that are known when it is compiled, and segments. Sinks are neither: where they
stand depends on the documents. They are therefore copied in front of all keys, where the static
mask shows them to every query and their segments keep documents apart. A query that sees a sink in
its window must not see the copy too: one feature more in queries and keys for each sink adds
minus infinity, or as good as that, to its score.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import compat

_BLOCK = 512
_HIDDEN = -1e30
"""Added to scores of copies that a query must not see; far from any score and from overflow."""


def splash(
    q,
    k,
    v,
    q_segments,
    k_segments,
    k_positions,
    *,
    causal: bool,
    window: int | None,
    sinks: int,
    scale: float,
    interpret: bool = False,
):
    """As `attention.attend`, in blocks of up to 512 queries and keys.

    Args:
      interpret: run the kernel's program in Python, on any platform.
    """
    length, keys = q.shape[1], k.shape[1]
    # A document that loses sinks from sight is longer than the window; so many are in a row.
    copies = 0 if window is None else sinks * (keys // (window + 1))
    rows, columns = (min(_BLOCK, n + -n % 128) for n in (length, keys + copies))
    if q_segments is None and (copies or length % rows or keys % columns):
        q_segments, k_segments = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
    q = (q * scale).astype(q.dtype)
    if copies:
        arrays = (q, k, v, q_segments, k_segments, k_positions)
        q, k, v, k_segments = _with_sinks(*arrays, window, sinks, copies)

    q, k, v = _pad(q, rows), _pad(k, columns), _pad(v, columns)
    ids = None
    if q_segments is not None:
        ids = compat.splash.SegmentIds(_pad(q_segments, rows, -2), _pad(k_segments, columns, -2))
    mask = _mask((q.shape[1], k.shape[1]), causal, window, keys - length + copies, copies)
    kernel = compat.splash.make_splash_mha_single_device(
        compat.splash.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=compat.splash.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        interpret=interpret,
    )
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    return jnp.moveaxis(jax.vmap(kernel)(q, k, v, ids), 1, 2)[:, :length]


class _Front(compat.splash.Mask):
    """The first ``count`` keys are seen by every query."""

    def __init__(self, shape: tuple[int, int], count: int):
        self._shape, self._count = shape, count

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __getitem__(self, index) -> np.ndarray:
        rows, columns = (np.arange(n)[part] for n, part in zip(self._shape, index, strict=True))
        return np.broadcast_to(columns < self._count, (rows.size, columns.size))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Front) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((_Front, self._shape, self._count))


def _mask(shape: tuple[int, int], causal: bool, window: int | None, past: int, copies: int) -> Any:
    """What the queries, ``past`` keys before the first, see of the keys, ``copies`` in front."""
    if window is not None:
        near = compat.splash.LocalMask(shape, (window - 1, 0), past)
        return _Front(shape, copies) | near if copies else near
    return compat.splash.CausalMask(shape, past) if causal else compat.splash.FullMask(shape)


def _with_sinks(q, k, v, q_segments, k_segments, positions, window, sinks, copies):
    """Queries, keys, values and the keys' segments with ``copies`` of sinks in front of the keys.

    Only sinks that a query has lost from its window are copied; there are at most ``copies``.
    """
    batch, keys = positions.shape
    past = keys - q.shape[1]
    index = jnp.arange(keys, dtype=jnp.int32)
    # The first query that has lost this key; documents are in one piece.
    loser = jnp.maximum(index + window - past, 0)
    same = q_segments.at[:, loser].get(mode="fill", fill_value=0) == k_segments
    lost = same & (loser < q.shape[1])[None] & (positions >= 0) & (positions < sinks)
    place = jax.vmap(lambda row: jnp.nonzero(row, size=copies, fill_value=keys)[0])(lost)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def copied(x, fill):
        return x.at[row, place].get(mode="fill", fill_value=fill)

    def front(x, fill=0):
        return jnp.concatenate([copied(x, fill), x], axis=1)

    def widen(x, more):
        more = jnp.broadcast_to(more[:, :, None], (*x.shape[:3], sinks))
        return jnp.concatenate([x, more.astype(x.dtype)], axis=3)

    # A copy's score gains _HIDDEN unless the sink is behind the query's window.
    number = jnp.arange(sinks, dtype=jnp.int32)[None, None]
    seen = positions[:, past:, None] - number >= window
    which = jnp.pad(copied(positions, -1)[..., None] == number, ((0, 0), (0, keys), (0, 0)))
    q, k = widen(q, jnp.where(seen, 0.0, _HIDDEN)), widen(front(k), which)
    return q, k, front(v), front(k_segments, -2)


def _pad(x, size: int, fill: int = 0):
    """``x`` with an axis 1 that ``size`` divides."""
    rest = [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *rest), constant_values=fill)
