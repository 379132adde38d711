"""Monarch matrices: products of block-diagonal matrices and fixed permutations.

Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022
(arXiv:2204.00595), section 3.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

BLOCKS = PartitionSpec(None, "embed", "inner")
"""Logical axes of a kernel of blocks. Not along the blocks: XLA (of jax 0.10) then returned other
gradients on a mesh of 2 x 2 x 2 than on one device."""


class BlockDense(nn.Module):
    """``x`` times a block-diagonal matrix, plus a bias; in ``x``'s dtype.

    Parameters: ``kernel`` ``(blocks, D / blocks, features / blocks)``, ``bias`` ``(features,)``.

    Attributes:
      features: channels of the outputs.
      blocks: which both widths are multiples of.
      use_bias: whether there is a bias.
      gain: variance of the initial kernel, as a multiple of 1 over a block's rows.
    """

    features: int
    blocks: int
    use_bias: bool = True
    gain: float = 1 / 3

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b n"]:
        require_blocks(self.name or "BlockDense", self.blocks, x.shape[-1], self.features)
        rows, columns = (size // self.blocks for size in (x.shape[-1], self.features))
        init = nn.initializers.variance_scaling(self.gain, "fan_in", "uniform", batch_axis=(0,))
        kernel = self.param("kernel", init, (self.blocks, rows, columns), jnp.float32)
        parts = x.reshape(*x.shape[:-1], self.blocks, rows)
        y = jnp.einsum("...kp,kpq->...kq", parts, kernel.astype(x.dtype))
        y = y.reshape(*x.shape[:-1], self.features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)
        return y


class MonarchDense(nn.Module):
    """``x`` times ``P' L P R``: both factors block-diagonal, P a transposition between them.

    With as many blocks as a block has rows, every output depends on every input, by
    ``2 D^1.5`` numbers rather than ``D^2``.

    Parameters: ``right/kernel`` ``(blocks, D / blocks, D / blocks)``, ``left/kernel``
    ``(blocks, D / blocks, features / blocks)`` and, if wanted, ``left/bias``, before P'.

    Attributes:
      features, blocks, use_bias: as ``BlockDense`` has them.
    """

    features: int
    blocks: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b n"]:
        x = BlockDense(x.shape[-1], self.blocks, use_bias=False, gain=1.0, name="right")(x)
        x = transposed(x, self.blocks)
        x = BlockDense(self.features, self.blocks, self.use_bias, name="left")(x)
        return transposed(x, self.features // self.blocks)


def transposed(x: Float[Array, "*b d"], columns: int) -> Float[Array, "*b d"]:
    """Channels as a matrix of so many columns, row by row, read column by column."""
    matrix = x.reshape(*x.shape[:-1], -1, columns)
    return jnp.swapaxes(matrix, -1, -2).reshape(x.shape)


def require_blocks(name: str, blocks: int, *widths: int) -> None:
    """Raises ValueError unless ``blocks`` divides the widths."""
    for width in widths:
        if width % blocks:
            raise ValueError(
                f"{name}: {blocks} blocks must divide {width} channels; choose another number of "
                "blocks"
            )
