"""Which document each token of a batch belongs to, as mixers and ops take it."""

from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Inexact, Int, Shaped

from pallas_kernels.common import segments as segment_ops
from seqmodels.arguments import segment_order
from seqmodels.parallel import shards
from seqmodels.parallel.mesh import shards_of


@flax.struct.dataclass
class Segments:
    """Which document each token of a batch belongs to; built once per batch.

    Attributes:
      ids: ``(B, L)`` int32, the caller's document ids; 0 is padding, only at the end of a row.
      index: ``(B, L)`` int32, documents numbered 1.. along each row; 0 on padding.
      positions: ``(B, L)`` int32, from the start of the document within this row.
      single: static promise that every row is *one* document followed by padding. Mixers then
        take paths that need no resets.
    """

    ids: Any
    index: Any
    positions: Any
    single: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def from_ids(cls, ids: Shaped[Array | np.ndarray, "..."], single: bool = False) -> "Segments":
        """Derive index and positions from ``ids``, integers ``(B, L)``.

        Raises:
          ValueError: no integers ``(B, L)``; and where the values can be read (numpy, or JAX
            outside of jit), a negative id, padding before a real token, or several documents in a
            row that is ``single``.
        """
        segment_order(ids, single)
        ids = jnp.asarray(ids, jnp.int32)
        if shards_of(ids.shape[1]) > 1:
            index, positions = shards.documents(ids)
        else:
            index = segment_ops.index(ids)
            positions = segment_ops.positions(index)
        return cls(ids=ids, index=index, positions=positions, single=single)

    @property
    def mask(self) -> Bool[Array, "b l"]:
        """True on real tokens."""
        return self.ids != 0

    @property
    def lengths(self) -> Int[Array, " b"]:
        """Real tokens in each row."""
        return jnp.sum(self.mask, axis=1, dtype=jnp.int32)


def index_of(segments: Segments | None) -> Int[Array, "b l"] | None:
    """Numbers of the documents along each row; None, one document, without segments."""
    return None if segments is None else segments.index


def mask_padding(x: Inexact[Array, "b l *d"], segments: Segments | None) -> Any:
    """``x`` with zeros on padding."""
    if segments is None:
        return x
    mask = segments.mask.reshape(*segments.ids.shape, *(1,) * (x.ndim - 2))
    return jnp.where(mask, x, jnp.zeros_like(x))


def last_token(
    x: Shaped[Array, "b l *d"], before: Shaped[Array, "b *d"], segments: Segments | None
) -> Shaped[Array, "b *d"]:
    """Each row's last real token; ``before``, in ``x``'s dtype, in rows of padding."""
    if segments is None:
        return x[:, -1]
    lengths = segments.lengths.reshape(-1, *(1,) * (x.ndim - 1))
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0), axis=1)[:, 0]
    return jnp.where(lengths[:, 0] > 0, last, before.astype(x.dtype))
