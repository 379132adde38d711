"""Spectra by matrix products: a transform of n = N1 N2 numbers as two dense ones, for matrix units.

With the place `N2 i + j` and the frequency `p + N1 q` (Fu, Kumbong, Nguyen & Ré, "FlashFFTConv",
ICLR 2024, section 3, the order-2 Monarch decomposition; Bailey 1990),

    X[p + N1 q] = sum_j w_N2^(j q) w_n^(j p) sum_i w_N1^(i p) x[N2 i + j],    w_m = exp(-2 pi i / m)

Numbers are real, so the frequencies `p <= N1 / 2` are all: what belongs to N1 - p is the conjugate.
That halves both products. Rows i that are only padding are left out of the first, and out of the
last one of the inverse. The layout of the tokens is that of the op, nothing is transposed.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.long_conv.spectrum import Transform, convolution, wide

_SUBLANES = 8


def factors(least: int) -> tuple[int, int]:
    """`(N1, N2)` with a product of at least so many and little more; N1 is even.

    The products take about `2 n (N1 + 4 N2)` operations: the second is between complex numbers.
    """
    columns = max(1, round(math.sqrt(least) / 2 / _SUBLANES)) * _SUBLANES
    if least <= 2 * _SUBLANES:
        columns = 1
    rows = -(-least // columns)
    return max(2, rows + rows % 2), columns


class Matrices(NamedTuple):
    """What the products need; complex numbers are pairs of reals, real part first.

    With `P = N1 / 2 + 1`:
      spread: `(P, 2, N1)`, `w_N1^(i p)`.
      gather: `(N1, P, 2)`, the inverse of `spread` for spectra of real numbers, divided by n.
      within: `(2, N2, 2, N2)`, from (part, j) to (part, q); `back` is that of the inverse.
      twiddle: `(2, P, N2)`, `w_n^(j p)`.
    """

    spread: np.ndarray
    gather: np.ndarray
    within: np.ndarray
    back: np.ndarray
    twiddle: np.ndarray


@functools.cache
def matrices(rows: int, columns: int) -> Matrices:
    """In float64."""
    half = rows // 2 + 1
    p, i, j = np.arange(half), np.arange(rows), np.arange(columns)
    outer = _turn(np.outer(p, i), rows)
    # p and N1 - p are one pair, but 0 and N1 / 2 are alone.
    weight = np.where((p == 0) | (2 * p == rows), 1.0, 2.0) / (rows * columns)
    inner = _turn(np.outer(j, j), columns)
    real, imaginary = inner.real, inner.imag
    twiddle = _turn(np.outer(p, j), rows * columns)
    return Matrices(
        spread=np.stack([outer.real, outer.imag], 1),
        gather=np.stack([(outer.real.T * weight), (outer.imag.T * weight)], 2),
        within=np.stack([[real, imaginary], [-imaginary, real]]).transpose(0, 2, 1, 3),
        back=np.stack([[real, -imaginary], [imaginary, real]]).transpose(0, 2, 1, 3),
        twiddle=np.stack([twiddle.real, twiddle.imag]),
    )


def _turn(k: np.ndarray, n: int) -> np.ndarray:
    """`w_n^k`; whole turns are taken off in integers."""
    return np.exp(-2j * np.pi * (k % n) / n)


def plan(least: int, dtype: Any) -> Transform:
    """Spectra are pairs of real planes, `(B, P, 2, N2, H)`."""
    rows, columns = factors(least)
    tables = matrices(rows, columns)
    # Three passes of a matrix unit keep 16 bits, where bfloat16 has 8.
    narrow = dtype == jnp.bfloat16
    precision = jax.lax.Precision.HIGH if narrow else jax.lax.Precision.HIGHEST

    def constant(table: np.ndarray) -> jax.Array:
        return jnp.asarray(table, wide(dtype))

    def product(equation: str, table: np.ndarray, x: jax.Array) -> jax.Array:
        return jnp.einsum(equation, constant(table), x, precision=precision)

    def turned(x: jax.Array, sign: float) -> jax.Array:
        cosine, sine = constant(tables.twiddle[:, None, :, :, None])
        real, imaginary = x[:, :, 0], sign * x[:, :, 1]
        return jnp.stack(
            [real * cosine - imaginary * sine, sign * (real * sine + imaginary * cosine)], 2
        )

    def forward(x: jax.Array) -> jax.Array:
        used = -(-x.shape[1] // columns)
        x = jnp.pad(x, ((0, 0), (0, used * columns - x.shape[1]), (0, 0)))
        x = x.reshape(x.shape[0], used, columns, x.shape[2])
        x = product("pzi,bijh->bpzjh", tables.spread[:, :, :used], x)
        return product("zjyq,bpzjh->bpyqh", tables.within, turned(x, 1.0))

    def inverse(spectrum: jax.Array, count: int) -> jax.Array:
        used = -(-count // columns)
        x = turned(product("zqyj,bpzqh->bpyjh", tables.back, spectrum), -1.0)
        x = product("ipz,bpzjh->bijh", tables.gather[:used], x)
        return x.reshape(x.shape[0], used * columns, x.shape[3])[:, :count]

    return Transform(
        size=rows * columns,
        forward=forward,
        inverse=inverse,
        multiply=lambda a, b: _multiply(a, b, 1.0),
        correlate=lambda a, b: _multiply(a, b, -1.0),
        total=lambda s: s.sum(0, keepdims=True),
    )


def _multiply(a: jax.Array, b: jax.Array, sign: float) -> jax.Array:
    """`a b`, or `a` times the conjugate of `b` for a sign of -1."""
    (ar, ai), (br, bi) = (a[:, :, 0], a[:, :, 1]), (b[:, :, 0], sign * b[:, :, 1])
    return jnp.stack([ar * br - ai * bi, ar * bi + ai * br], 2)


long_conv = convolution(plan)
