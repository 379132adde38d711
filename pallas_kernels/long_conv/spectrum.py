"""A convolution as a product of spectra, for any pair of transforms, with its derivative.

Two-sided filters cost what one-sided ones do: in a circle of n places the weights of earlier tokens
stand at 0, 1, ... and those of later ones at n - 1, n - 2, ...; nothing meets as long as
`n >= L + max(Lk - 1, Lr)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Transform(NamedTuple):
    """A discrete Fourier transform of `size` real numbers and its inverse.

    Attributes:
      size: n.
      forward: `(B, T, H) -> spectrum` of rows that go on with zeros, `T <= n`.
      inverse: `(spectrum, T) -> (B, T, H)`, the first T of n numbers.
      multiply: the product of two spectra.
      correlate: the product of the first and the conjugate of the second.
      total: the sum of a spectrum over rows, `B -> 1`.
    """

    size: int
    forward: Callable[[jax.Array], Any]
    inverse: Callable[[Any, int], jax.Array]
    multiply: Callable[[Any, Any], Any]
    correlate: Callable[[Any, Any], Any]
    total: Callable[[Any], Any]


def needed(length: int, kernel_size: int, kernel_size_reverse: int) -> int:
    """The shortest circle in which L tokens and a filter do not meet from behind."""
    return length + max(kernel_size - 1, kernel_size_reverse)


def convolution(plan: Callable[[int, Any], Transform]) -> Callable[..., jax.Array]:
    """`conv(u (B, L, H), kernel (H, Lk), kernel_reverse (H, Lr) | None) -> y (B, L, H)`.

    The derivative keeps both spectra: forward and backward take two transforms of the tokens each.
    What lies beyond L of a filter meets no token.

    Args:
      plan: `(n, dtype of u) -> Transform` of at least n numbers.
    """

    def forward(u, kernel, kernel_reverse):
        length, dtype = u.shape[1], wide(u.dtype)
        kernel_size = min(kernel.shape[1], length)
        kernel_size_reverse = (
            0 if kernel_reverse is None else min(kernel_reverse.shape[1], length - 1)
        )
        transform = plan(needed(length, kernel_size, kernel_size_reverse), u.dtype)
        circle = kernel[:, :kernel_size].astype(dtype)
        if kernel_size_reverse:
            gap = transform.size - kernel_size - kernel_size_reverse
            back = jnp.flip(kernel_reverse[:, :kernel_size_reverse].astype(dtype), 1)
            circle = jnp.concatenate([jnp.pad(circle, ((0, 0), (0, gap))), back], 1)
        tokens = transform.forward(u.astype(dtype))
        filters = transform.forward(circle.T[None])
        y = transform.inverse(transform.multiply(tokens, filters), length)
        return y.astype(u.dtype), (u, kernel, kernel_reverse, tokens, filters)

    def backward(residuals, dy):
        u, kernel, kernel_reverse, tokens, filters = residuals
        length, dtype = u.shape[1], wide(u.dtype)
        kernel_size = min(kernel.shape[1], length)
        kernel_size_reverse = (
            0 if kernel_reverse is None else min(kernel_reverse.shape[1], length - 1)
        )
        transform = plan(needed(length, kernel_size, kernel_size_reverse), u.dtype)
        cotangents = transform.forward(dy.astype(dtype))
        du = transform.inverse(transform.correlate(cotangents, filters), length)
        products = transform.total(transform.correlate(cotangents, tokens))
        circle = transform.inverse(
            products, transform.size if kernel_size_reverse else kernel_size
        )[0].T
        dkernel = _like(circle[:, :kernel_size], kernel)
        dreverse = None
        if kernel_reverse is not None:
            back = circle[:, circle.shape[1] - kernel_size_reverse :]
            dreverse = _like(jnp.flip(back, 1), kernel_reverse)
        return du.astype(u.dtype), dkernel, dreverse

    @jax.custom_vjp
    def convolve(u, kernel, kernel_reverse):
        return forward(u, kernel, kernel_reverse)[0]

    convolve.defvjp(forward, backward)
    return convolve


def wide(dtype: Any) -> Any:
    """What is computed in: float32, or float64 for float64."""
    return jnp.dtype("float32") if dtype == jnp.bfloat16 else dtype


def _like(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """0 for the taps that no token meets."""
    missing = kernel.shape[1] - gradient.shape[1]
    return jnp.pad(gradient, ((0, 0), (0, missing))).astype(kernel.dtype)
