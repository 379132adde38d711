"""Norms; BatchNorm knows about padding."""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NormKind = Literal["batch", "layer", "rms"]


class BatchNorm(nn.Module):
    """Batch normalisation over batch and length that leaves padding out of its statistics.

    The running ``mean`` and ``var`` ``(H,)`` live in the collection "batch_stats":
    ``running = momentum * running + (1 - momentum) * batch``, with the biased variance. Under
    ``jit`` over a mesh the sums run over the *global* array, so the statistics are those of the
    whole batch and the whole length with no collective written here. A batch of nothing but
    padding leaves the running statistics alone.
    """

    momentum: float = 0.95
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l h"],
        mask: Bool[Array, "b l"] | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "b l h"]:
        """Normalises with batch statistics, or with the running ones if ``deterministic``."""
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,))
        if deterministic:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var, count = _moments(x.astype(jnp.float32), mask)
            if not self.is_initializing():
                keep = jnp.where(count > 0, self.momentum, 1.0)
                running_mean.value = keep * running_mean.value + (1.0 - keep) * mean
                running_var.value = keep * running_var.value + (1.0 - keep) * var
        gain = scale / jnp.sqrt(var + self.epsilon)
        return (x * gain[None, None] + (bias - mean * gain)[None, None]).astype(x.dtype)


def _moments(
    x: Float[Array, "b l h"], mask: Bool[Array, "b l"] | None
) -> tuple[Float[Array, " h"], Float[Array, " h"], Any]:
    """Mean, biased variance and number of tokens."""
    if mask is None:
        mask = jnp.ones(x.shape[:2], bool)
    count = jnp.sum(mask, dtype=jnp.float32)
    total = jnp.maximum(count, 1.0)
    kept = jnp.where(mask[..., None], x, 0.0)
    mean = jnp.sum(kept, axis=(0, 1)) / total
    square = jnp.sum(kept * kept, axis=(0, 1)) / total
    return mean, jnp.maximum(square - mean * mean, 0.0), count


class Norm(nn.Module):
    """The norm called ``kind``, with one signature for all: ``(B, L, H)`` and a padding mask."""

    kind: NormKind
    momentum: float = 0.95

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l h"],
        mask: Bool[Array, "b l"] | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "b l h"]:
        if self.kind == "batch":
            return BatchNorm(self.momentum, name="batch")(x, mask, deterministic=deterministic)
        layer = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[self.kind]
        return layer(name=self.kind, dtype=x.dtype)(x)
