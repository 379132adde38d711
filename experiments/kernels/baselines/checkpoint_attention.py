"""What checkpoint attention is measured against: attention over all tokens, in plain JAX."""

import jax
import jax.numpy as jnp

BLOCK = 1024


def causal_attention(q, k, v, *, interval: int):
    """`jax.nn.dot_product_attention` over every earlier token; `interval` has no use."""
    del interval
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def blocked_attention(q, k, v, *, interval: int):
    """The same numbers, 1,024 queries at a time, each block recomputed in the backward pass.

    Queries are those of the last keys.
    """
    del interval
    batch, length, heads, width = q.shape
    blocks, keys = length // BLOCK, k.shape[1]

    @jax.checkpoint
    def block(part):
        first, q = part
        query = keys - length + first + jnp.arange(BLOCK)[:, None]
        mask = query >= jnp.arange(keys)[None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])

    parts = jnp.moveaxis(q.reshape(batch, blocks, BLOCK, heads, width), 1, 0)
    o = jax.lax.map(block, (BLOCK * jnp.arange(blocks), parts))
    return jnp.moveaxis(o, 0, 1).reshape(batch, length, heads, -1)


def masked_attention(q, k, v, *, interval: int):
    """The same numbers as the op, from all `L x L` scores and a mask."""
    token = jnp.arange(q.shape[1])
    query, key = token[:, None], token[None]
    checkpoint = (key + 1) % interval == 0
    mask = (query == key) | (checkpoint & (key < query))
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
