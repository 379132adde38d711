"""B2S6: Mamba's recurrence in blocks of channels, complex and with a bias.

Yu & Erichson, "Block-Biased Mamba for Long-Range Sequence Processing", NeurIPS 2025
(arXiv:2505.09022). Where the paper was not at hand the choice is ours: B and C are complex, a
bias of B starts at 1 (as S4D's input vector), and step sizes have Mamba's low rank in each block.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from seqmodels import ops
from seqmodels.layers.heads import step_bias
from seqmodels.mixers.base import Segments
from seqmodels.mixers.ssm import constant


class BlockRecurrence(nn.Module):
    """``h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t (B_t + B_bias)``, ``y_t = Re(C_t h_t) + D x_t``.

    Channel e belongs to a block; ``[δ, B, C] = x_proj(x)`` and ``Δ = softplus(dt_proj(δ))`` are
    made of the token's channels of that block alone. ``A = -exp(A_log) + i A_imag``, initially
    ``-1/2 + i pi n`` (S4D-Lin). Step sizes, states and what enters them are float32.

    Parameters: ``x_proj`` ``(blocks, E / blocks, rank + 4 N)``, of real and imaginary parts of B,
    then C; ``dt_proj`` ``(blocks, rank, E / blocks)``; ``dt_bias``, ``D`` ``(E,)``; ``A_log``,
    ``A_imag`` ``(E, N)``; ``B_bias`` ``(E, N, 2)``, real and imaginary part.

    Attributes:
      states: N.
      blocks: which divide the channels.
      rank: of a block's step sizes.
      dt_min, dt_max: range of the log-uniform initial step sizes, one for each channel.
    """

    states: int
    blocks: int
    rank: int
    dt_min: float
    dt_max: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l e"],
        initial_state: Complex[Array, "b e n"],
        segments: Segments | None,
    ) -> tuple[Float[Array, "b l e"], Complex[Array, "b e n"]]:
        """Returns outputs in the dtype of ``x``, and the state after the last real token.

        Raises:
          ValueError: the blocks do not divide the channels.
        """
        channels, n = x.shape[-1], self.states
        if channels % self.blocks:
            raise ValueError(f"mamba mixer: blocks={self.blocks} must divide {channels} channels")
        u = x.astype(jnp.float32)
        parts = self._project("x_proj", u, self.rank + 4 * n)
        delta, *planes = jnp.split(parts, [self.rank + i * n for i in range(4)], axis=-1)
        b, c = (jax.lax.complex(planes[i], planes[i + 1]) for i in (0, 2))
        steps = self._project("dt_proj", delta, channels // self.blocks).reshape(u.shape)
        bias = self.param("dt_bias", step_bias(self.dt_min, self.dt_max), (channels,))
        steps = jax.nn.softplus(steps + bias[None, None])

        shape = (channels, n)
        log_real = self.param("A_log", nn.initializers.constant(np.log(0.5)), shape, jnp.float32)
        imaginary = self.param("A_imag", constant(np.tile(np.pi * np.arange(n), (channels, 1))))
        a = jax.lax.complex(-jnp.exp(log_real), imaginary)
        pairs = self.param("B_bias", constant(np.tile((1.0, 0.0), (*shape, 1))))
        b_bias = jax.lax.complex(pairs[..., 0], pairs[..., 1])
        y, final = block_scan(u, steps, a, b, c, b_bias, initial_state, segments)
        skip = self.param("D", nn.initializers.ones, (channels,), jnp.float32)
        return (y + skip[None, None] * u).astype(x.dtype), final

    def _project(self, name: str, x: Float[Array, "b l *d"], features: int) -> Array:
        """Block by block: ``(B, L, blocks, features)``."""
        x = x.reshape(*x.shape[:2], self.blocks, -1)
        init: Any = nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=-2, out_axis=-1, batch_axis=0
        )
        kernel = self.param(name, init, (self.blocks, x.shape[-1], features), jnp.float32)
        return jnp.einsum("blhp,hpr->blhr", x, kernel)


def block_scan(
    x: Float[Array, "b l e"],
    steps: Float[Array, "b l e"],
    a: Complex[Array, "e n"],
    b: Complex[Array, "b l h n"],
    c: Complex[Array, "b l h n"],
    b_bias: Complex[Array, "e n"],
    initial_state: Complex[Array, "b e n"],
    segments: Segments | None,
) -> tuple[Float[Array, "b l e"], Complex[Array, "b e n"]]:
    """The recurrence of ``BlockRecurrence`` without D, and the states after it.

    One of the N states of all channels at a time: what is held, for the backward pass too, has the
    size of ``x``, and not N times that.
    """
    width = x.shape[-1] // b.shape[2]

    def state(y: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        a, b, c, b_bias, before = now
        b, c = (jnp.repeat(part, width, axis=-1) for part in (b, c))
        decay = jnp.exp(steps.astype(a.dtype) * a[None, None])
        drive = (steps * x).astype(b.dtype) * (b + b_bias[None, None])
        h, after = ops.linear_scan(decay, drive, initial_state=before, segments=segments)
        return y + (c * h).real, after

    each = tuple(jnp.moveaxis(part, -1, 0) for part in (a, b, c, b_bias, initial_state))
    y, final = jax.lax.scan(jax.checkpoint(state), jnp.zeros_like(x), each)
    return y, jnp.moveaxis(final, 0, -1)
