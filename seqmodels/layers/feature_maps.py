"""Feature maps whose inner products stand for the exponential of softmax attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def taylor(x: Float[Array, "*b k"]) -> Float[Array, "*b f"]:
    """``phi(q) . phi(k) = 1 + s + s^2 / 2`` with ``s = q . k / sqrt(K)``; float32.

    That is the exponential's second-order expansion (Keles et al. 2023; Arora et al., "Simple
    linear attention language models balance the recall-throughput tradeoff", 2024, section 4.1).
    Of the products ``x_i x_j`` each pair is there once: ``F = 1 + K + K (K + 1) / 2``, 153 for 16.
    """
    size = x.shape[-1]
    x = x.astype(jnp.float32) * size**-0.25
    parts = [jnp.ones_like(x[..., :1]), x, x * x * 2**-0.5]
    parts += [x * jnp.roll(x, distance, axis=-1) for distance in range(1, (size + 1) // 2)]
    if size % 2 == 0:
        half = size // 2
        parts.append(x[..., :half] * x[..., half:])
    return jnp.concatenate(parts, axis=-1)


def taylor_features(size: int) -> int:
    """F of ``taylor`` for K = ``size``."""
    return 1 + size + size * (size + 1) // 2
