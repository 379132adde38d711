"""The recurrence, one token at a time: slow, obvious, and what the spectrum is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common.backend import Backend


def forward(config, dt, eigenvalues, p, b, c, *, return_residuals: bool):
    """`((K,), None)`: `K_t = 2 Re C Ā^t B̄` with dense matrices of real numbers, a channel each.

    Twice: the first time for `Ā^L`, which C is recovered with from `c`. In float32 that is as exact
    as `I - Ā^L` is far from singular. Differentiable by JAX itself, any number of times.

    Args:
      config: the length L.
      dt: `(H,)`.
      eigenvalues, p, b: `(H, N/2)`.
      c: `(R, H, N/2)`, truncated.
    """
    unit = jnp.eye(2 * b.shape[1], dtype=dt.dtype)
    a_bar, b_bar = jax.vmap(_discrete)(dt, eigenvalues, p, b)

    def step(x, _):
        return _apply(a_bar, x), x

    def after(x):
        return jax.lax.scan(step, x, length=config.length)

    power, _ = after(jnp.broadcast_to(unit, a_bar.shape))
    row = jnp.concatenate([2 * c.real, -2 * c.imag], -1)  # (R, H, N)
    whole = jnp.linalg.solve((unit[None] - power).swapaxes(1, 2), jnp.moveaxis(row, 0, 2))
    _, states = after(b_bar[..., None])  # (L, H, N, 1)
    kernel = jnp.sum(whole[None] * states, axis=2)  # (L, H, R)
    return (kernel.T,), None


def _apply(a, x):
    return jnp.matmul(a, x, precision=jax.lax.Precision.HIGHEST)


def _discrete(dt, eigenvalues, p, b):
    """`Ā (N, N)` and `B̄ (N,)` by the bilinear rule, on `[real parts, imaginary parts]`."""
    half = len(b)

    def planes(x):
        return jnp.concatenate([x.real, x.imag])

    def continuous(e):
        x = jax.lax.complex(e[:half], e[half:])
        # The conjugate modes meet p* too: twice the real part.
        through = 2 * jnp.sum(jnp.conj(p) * x).real
        return planes(eigenvalues * x - p * through.astype(p.dtype))

    unit = jnp.eye(2 * half, dtype=dt.dtype)
    a = jax.vmap(continuous, out_axes=1)(unit) * dt / 2
    left = unit - a
    return jnp.linalg.solve(left, unit + a), jnp.linalg.solve(left, planes(b) * dt)


BACKEND = Backend(forward)
