"""The kernel of S4 against its recurrence in double precision, and what it keeps in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import long_conv, s4_kernel
from pallas_kernels.tools import testing
from seqmodels.mixers import hippo
from tests.arrays import ones


def legs(size, steps, directions=1, seed=0):
    """HiPPO-LegS in its eigenbasis, ``(dt, eigenvalues, p, b, c)`` in single precision."""
    rng = np.random.default_rng(seed)
    values, vectors = hippo.normal_eigen(size)
    p = vectors.conj().T @ np.sqrt(np.arange(size) + 0.5)
    b = hippo.normal_input(vectors)
    shape = (directions, len(steps), size // 2)
    c = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / 2**0.5
    rows = [np.tile(x, (len(steps), 1)) for x in (values, p, b)]
    return jnp.asarray(steps, "float32"), *(jnp.asarray(x, "complex64") for x in (*rows, c))


def discrete(dt, values, p, b):
    """``Ā (N, N)`` and ``B̄ (N,)`` of one channel, bilinear, on (real parts, imaginary parts)."""
    half = len(values)
    values, p, b = (np.asarray(x, np.complex128) for x in (values, p, b))

    def continuous(x):
        return values * x - p * 2 * (p.conj() @ x).real

    units = np.eye(2 * half)
    columns = [continuous(e[:half] + 1j * e[half:]) for e in units]
    a = np.stack([np.r_[x.real, x.imag] for x in columns], 1) * float(dt) / 2
    left = np.linalg.inv(np.eye(2 * half) - a)
    return left @ (np.eye(2 * half) + a), left @ np.r_[b.real, b.imag] * float(dt)


def row(c):
    """``2 Re c x`` as a row of real numbers."""
    return np.r_[2 * c.real, -2 * c.imag].astype(np.float64)


def truncated(c, a, length):
    """``C (I - Ā^L)``."""
    r = row(c) @ (np.eye(len(a)) - np.linalg.matrix_power(a, length))
    return (r[: len(c)] - 1j * r[len(c) :]) / 2


def naive(dt, values, p, b, c, length):
    """The published formula with the whole Cauchy matrix ``(H, N/2, L / 2 + 1)``."""
    w = jnp.exp(-2j * jnp.pi * jnp.arange(length // 2 + 1) / length)
    step, values = dt[:, None, None].astype(b.dtype), values[..., None]

    def cauchy(v, c):
        def half(values, g):
            return jnp.sum(step * g / (2 * (1 - w)[None, None] - (1 + w)[None, None] * values), 1)

        g = (v * c)[..., None]
        return half(step * values, g) + half(step * jnp.conj(values), jnp.conj(g))

    w1 = (1 + w)[None]
    through = cauchy(b, jnp.conj(p)) / (1 + w1 * cauchy(p, jnp.conj(p)))
    spectra = [2 * (cauchy(b, x) - w1 * cauchy(p, x) * through) for x in c]
    return jnp.fft.irfft(jnp.stack(spectra), length)


@pytest.mark.parametrize("dt", [1e-3, 1e-2, 1e-1])
def test_convolution_equals_recurrence_at_sixteen_thousand_tokens(dt):
    length = 16384
    step, values, p, b, c = legs(64, [dt])
    a, b_bar = discrete(step[0], values[0], p[0], b[0])
    cut = truncated(c[0, 0], a, length).astype(np.complex64)[None, None]
    kernel = jax.jit(functools.partial(s4_kernel, length=length))(step, values, p, b, cut)
    u = np.random.default_rng(1).standard_normal(length).astype(np.float32)
    c_row, x, z, y, k = row(c[0, 0]), np.zeros(64), b_bar, [], []
    for token in u:
        x = a @ x + b_bar * token
        y.append(c_row @ x)
        k.append(c_row @ z)
        z = a @ z
    testing.assert_close(kernel[0, 0], np.array(k), testing.FLOAT32_TOLERANCE)
    actual = long_conv(jnp.asarray(u)[None, :, None], kernel[0])[0, :, 0]
    testing.assert_close(actual, np.array(y), testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("length", [1, 2, 15, 130])
def test_any_length_and_two_directions(length):
    step, values, p, b, c = legs(8, [0.02, 0.3], directions=2)
    systems = [discrete(step[h], values[h], p[h], b[h]) for h in range(2)]
    cut = np.stack([[truncated(c[r, h], systems[h][0], length) for h in range(2)] for r in (0, 1)])
    run = jax.jit(functools.partial(s4_kernel, length=length))
    kernel = run(step, values, p, b, np.complex64(cut))
    powers = [[np.linalg.matrix_power(a, t) @ b for t in range(length)] for a, b in systems]
    wanted = np.einsum(
        "rhn,hln->rhl", [[row(c[r, h]) for h in range(2)] for r in (0, 1)], np.array(powers)
    )
    testing.assert_close(kernel, wanted, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("length", [33, 140])
def test_gradients_in_double_precision(length):
    with jax.enable_x64(True):
        step, *others = legs(6, [0.02, 0.3], directions=2)
        args = (jnp.asarray(step, "float64"), *(jnp.asarray(x, "complex128") for x in others))
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, length)))
        actual, wanted = (
            testing.value_and_gradients(
                functools.partial(op, length=length), *args, cotangents=cotangent
            )
            for op in (s4_kernel, naive)
        )
        testing.assert_close(actual, wanted, testing.FLOAT64_TOLERANCE)


def test_gradients_in_single_precision():
    args = legs(16, [0.02, 0.3])
    cotangent = np.random.default_rng(1).standard_normal((1, 2, 200)).astype(np.float32)
    actual = testing.value_and_gradients(
        functools.partial(s4_kernel, length=200), *args, cotangents=cotangent
    )
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, "complex128" if x.ndim > 1 else "float64") for x in args]
        wanted = testing.value_and_gradients(
            functools.partial(naive, length=200), *wide, cotangents=np.float64(cotangent)
        )
        wanted = jax.tree.map(np.asarray, wanted)
    testing.assert_close(actual, wanted, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("length", [2, 40])
def test_the_spectrum_is_that_of_the_recurrence_in_double_precision(length):
    """The reference, whose dense matrices go token by token, and all gradients."""
    with jax.enable_x64(True):
        step, *others = legs(6, [0.05, 0.3], directions=2)
        args = (jnp.asarray(step, "float64"), *(jnp.asarray(x, "complex128") for x in others))
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, length)))
        portable, reference = (
            functools.partial(s4_kernel, length=length, implementation=name)
            for name in ("xla", "reference")
        )
        actual = testing.value_and_gradients(portable, *args, cotangents=cotangent)
        wanted = testing.value_and_gradients(reference, *args, cotangents=cotangent)
        testing.assert_close(actual, wanted, testing.FLOAT64_TOLERANCE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dt": ones((2, 1))}, r"dt must be \(H,\), got shape \(2, 1\)"),
        ({"eigenvalues": ones((3, 4), "complex64")}, r"eigenvalues must be .* = \(2, 'any'\)"),
        ({"p": ones((2, 3), "complex64")}, r"p must be .* = \(2, 4\), got shape \(2, 3\)"),
        ({"c": ones((2, 4), "complex64")}, r"c must be \(R, H, N/2\)"),
        ({"b": ones((2, 4))}, "b must be complex64 since dt is float32, got float32"),
        ({"length": 0}, "length=0 must be a whole number of at least 1"),
    ],
)
def test_bad_input_is_named(changed, message):
    names = ("dt", "eigenvalues", "p", "b", "c")
    arguments = dict(zip(names, legs(8, [0.02, 0.3]), strict=True)) | {"length": 5}
    with pytest.raises(ValueError, match=message):
        s4_kernel(**(arguments | changed))


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_width_states_and_length_exists(backward):
    """A Cauchy matrix at this size would have 537 MB."""
    width, states, length = 256, 64, 16384
    parameter = jax.ShapeDtypeStruct((width, states // 2), jnp.complex64)
    c_row = jax.ShapeDtypeStruct((1, *parameter.shape), jnp.complex64)
    steps = jax.ShapeDtypeStruct((width,), jnp.float32)

    def kernel(*args):
        return s4_kernel(*args, length=length)

    def both(cotangent, *args):
        k, pullback = jax.vjp(kernel, *args)
        return k, pullback(cotangent)

    args = (steps, parameter, parameter, parameter, c_row)
    cotangent = jax.ShapeDtypeStruct((1, width, length), jnp.float32)
    lowered = jax.jit(both).lower(cotangent, *args) if backward else jax.jit(kernel).lower(*args)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 64e6
