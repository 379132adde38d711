"""Norms; BatchNorm knows about padding."""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels.layers.projections import rms_normalise

NormKind = Literal["batch", "layer", "rms", "zero_centered_rms"]


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
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,), jnp.float32)
        if deterministic:
            gain = scale / jnp.sqrt(running_var.value + self.epsilon)
            shift = bias - running_mean.value * gain
            return (x * gain[None, None] + shift[None, None]).astype(x.dtype)
        if mask is None:
            mask = jnp.ones(x.shape[:2], bool)
        y, mean, var = _normalise(self.epsilon, x, mask, scale, bias)
        if not self.is_initializing():
            keep = jnp.where(jnp.any(mask), self.momentum, 1.0)
            running_mean.value = keep * running_mean.value + (1.0 - keep) * mean
            running_var.value = keep * running_var.value + (1.0 - keep) * var
        return y


# The derivative is written by hand: what autodiff makes of it costs fifteen times as much on a CPU.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(
    epsilon: float,
    x: Float[Array, "b l h"],
    mask: Bool[Array, "b l"],
    scale: Float[Array, " h"],
    bias: Float[Array, " h"],
) -> tuple[Float[Array, "b l h"], Float[Array, " h"], Float[Array, " h"]]:
    """``scale (x - mean) / sqrt(var + epsilon) + bias``; mean and biased variance of the tokens in
    ``mask``."""
    return _normalise_forward(epsilon, x, mask, scale, bias)[0]


def _normalise_forward(epsilon, x, mask, scale, bias):
    wide = x.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    kept = jnp.where(mask[..., None], wide, 0.0)
    mean = jnp.sum(kept, axis=(0, 1)) / total
    square = jnp.sum(kept * kept, axis=(0, 1)) / total
    var = jnp.maximum(square - mean * mean, 0.0)
    inverse = 1.0 / jnp.sqrt(var + epsilon)
    gain = scale * inverse
    y = (wide * gain[None, None] + (bias - mean * gain)[None, None]).astype(x.dtype)
    return (y, mean, var), (x, mask, scale, mean, inverse, total)


def _normalise_backward(epsilon, residuals, cotangents):
    x, mask, scale, mean, inverse, total = residuals
    dy, dmean, dvar = cotangents
    wide, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    gain = scale * inverse
    dbias = jnp.sum(dy, axis=(0, 1))
    dgain = jnp.sum(dy * (wide - mean[None, None]), axis=(0, 1))
    dvar = dvar - 0.5 * gain * inverse**2 * dgain
    dmean = dmean - gain * dbias - 2.0 * mean * dvar
    through = (2.0 * dvar / total)[None, None] * wide + (dmean / total)[None, None]
    dx = gain[None, None] * dy + jnp.where(mask[..., None], through, 0.0)
    return dx.astype(x.dtype), None, inverse * dgain, dbias


_normalise.defvjp(_normalise_forward, _normalise_backward)


class ZeroCenteredRMSNorm(nn.Module):
    """``(1 + scale) x / rms(x)`` with ``scale`` ``(H,)`` from 0 (Gemma); float32 inside."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b h"]) -> Float[Array, "*b h"]:
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        y = rms_normalise(x.astype(jnp.float32), self.epsilon)
        return (y * jnp.broadcast_to(1.0 + scale, y.shape)).astype(x.dtype)


class Norm(nn.Module):
    """The norm called ``kind``, with one signature for all: ``(B, L, H)`` and a padding mask.

    An ``epsilon`` of None is 1e-5 for "batch", 1e-6 for the others.
    """

    kind: NormKind
    momentum: float = 0.95
    epsilon: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l h"],
        mask: Bool[Array, "b l"] | None = None,
        *,
        deterministic: bool,
    ) -> Float[Array, "b l h"]:
        epsilon = self.epsilon or (1e-5 if self.kind == "batch" else 1e-6)
        if self.kind == "batch":
            norm = BatchNorm(self.momentum, epsilon, name="batch")
            return norm(x, mask, deterministic=deterministic)
        if self.kind == "zero_centered_rms":
            return ZeroCenteredRMSNorm(epsilon, name=self.kind)(x)
        layer = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[self.kind]
        return layer(epsilon=epsilon, name=self.kind, dtype=x.dtype)(x)
