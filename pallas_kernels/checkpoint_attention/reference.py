"""The oracle: one token at a time against all others, differentiated by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.checkpoint_attention.slots import Config
from pallas_kernels.common import segments
from pallas_kernels.common.backend import Backend

LOW = -1e30  # stands for the logarithm of 0
_HIGHEST = jax.lax.Precision.HIGHEST


def checkpoint_attention(
    config: Config, q, k, v, past_k, past_v, past_length, offset, segment_index
):
    """`o_t = sum_s softmax_s(scale q_t k_s) v_s` over the `s` that token t sees; and its `lse`.

    Args:
      config: static options.
      q: `(B, L, H, K)`.
      k, v: `(B, L, G, K)` and `(B, L, G, V)`, or both None: the tokens see `past_*` only.
      past_k, past_v: `(B, P, G, K)` and `(B, P, G, V)`, or both None.
      past_length: `(B,)` int32, or None for P.
      offset: `(B,)` int32, or None for 0.
      segment_index: `(B, L)` int32, or None.
    """
    batch, length, heads, _ = q.shape
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    segment_index = jnp.ones((batch, length), jnp.int32) if segment_index is None else segment_index
    at = jnp.arange(length, dtype=jnp.int32)[None]
    keys, values, masks = [], [], []
    if past_k is not None:
        valid = past_k.shape[1] if past_length is None else past_length[:, None]
        keys, values = [past_k], [past_v]
        held = jnp.arange(past_k.shape[1], dtype=jnp.int32)[None] < valid
        masks.append(lambda t, run: held & (run == 1)[:, None])
    if k is not None:
        keys, values = [*keys, k], [*values, v]
        position = segments.positions(segment_index)
        if offset is not None:
            position = position + jnp.where(segment_index == 1, offset[:, None], 0)
        marked = (position + 1) % config.interval == 0
        masks.append(
            lambda t, run: (segment_index == run[:, None]) & ((marked & (at < t)) | (at == t))
        )

    def joined(xs):
        return jnp.repeat(jnp.concatenate(xs, 1).astype(dtype), heads // xs[0].shape[2], axis=2)

    keys, values = joined(keys), joined(values)

    def token(t, q, run):
        mask = jnp.concatenate([mask(t, run) for mask in masks], 1) & (run > 0)[:, None]
        mask = mask[:, :, None]
        scores = config.scale * jnp.einsum("bhk,bshk->bsh", q, keys, precision=_HIGHEST)
        some = mask.any(1)
        highest = jax.lax.stop_gradient(jnp.where(mask, scores, LOW).max(1))
        highest = jnp.where(some, highest, 0.0)[:, None]
        p = jnp.where(mask, jnp.exp(jnp.where(mask, scores - highest, 0.0)), 0.0)
        total = jnp.where(some, p.sum(1), 1.0)
        p = jnp.where(mask, p / total[:, None], 0.0)
        o = jnp.einsum("bsh,bshv->bhv", p, values, precision=_HIGHEST)
        return o, jnp.where(some, highest[:, 0] + jnp.log(total), LOW)

    tokens = at[0], jnp.moveaxis(q.astype(dtype), 1, 0), segment_index.T
    o, lse = jax.lax.map(lambda x: token(*x), tokens)
    return jnp.moveaxis(o, 0, 1).astype(q.dtype), jnp.moveaxis(lse, 0, 1)


def forward(config: Config, *arrays, return_residuals: bool):
    """`((o, lse), None)`."""
    return checkpoint_attention(config, *arrays), None


BACKEND = Backend(forward)
