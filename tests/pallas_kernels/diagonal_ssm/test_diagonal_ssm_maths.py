"""Powers, matrices of a chunk and single steps, against NumPy in higher precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.diagonal_ssm import powers, tile
from pallas_kernels.tools import testing
from tests import tolerances


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def parameters(scale, decay=1e-5, size=200):
    rng = np.random.default_rng(0)
    real = -decay * 10 ** rng.uniform(-1, 0, size)
    return jnp.asarray(real + 1j * scale * rng.standard_normal(size), jnp.complex64)


def exact_power(log_a, t):
    return np.exp(np.asarray(log_a).astype(np.clongdouble) * np.asarray(t).astype(np.longdouble))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0, 100.0, 1e4])
def test_powers_are_accurate_up_to_the_limit(scale):
    log_a = parameters(scale)[:, None]
    t = jnp.asarray(np.r_[0:5, 2.0 ** np.arange(3, 18) - 1, 99_999], jnp.int32)[None]
    actual = np.asarray(jax.jit(powers.powers)(log_a, t))
    assert np.abs(actual - exact_power(log_a, t)).max() < tolerances.FLOAT32_POWER


def test_plain_powers_would_not_be():
    log_a = parameters(3.0)
    naive = np.asarray(jnp.exp(log_a * 99_999))
    assert np.abs(naive - exact_power(log_a, 99_999)).max() > 1e-3


def test_extreme_powers():
    t = jnp.arange(3, dtype=jnp.int32)
    np.testing.assert_array_equal(
        powers.powers(jnp.full(3, -1e4 + 2j, jnp.complex64), t), [1, 0, 0]
    )
    np.testing.assert_array_equal(powers.powers(jnp.zeros(3, jnp.complex64), t), [1, 1, 1])


def test_derivative_of_a_power():
    log_a = parameters(1.0, decay=0.1)
    t = jnp.full(log_a.shape, 7, jnp.int32)
    value, tangent = jax.jvp(lambda x: powers.powers(x, t), (log_a,), (jnp.ones_like(log_a),))
    np.testing.assert_allclose(tangent, 7 * value, **tolerances.EACH_FLOAT32_TERMS)
    value, tangent = jax.jvp(powers.decay, (log_a,), (jnp.ones_like(log_a),))
    np.testing.assert_array_equal(tangent[0], value[0])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0, 1e4])
def test_decay_in_two_parts(scale):
    log_a = parameters(scale, size=2000)
    nearest, lacking = map(np.asarray, jax.jit(powers.decay)(log_a))
    exact = exact_power(log_a, 1)
    assert np.abs(nearest - exact).max() > 2e-8
    assert (
        np.abs(nearest.astype(np.clongdouble) + lacking - exact).max()
        < tolerances.FLOAT32_POWER_AND_REST
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_matrices_of_a_chunk(steps):
    rng = np.random.default_rng(1)
    log_a = -rng.uniform(0.1, 1, (2, 3)) + 1j * rng.uniform(-3, 3, (2, 3))
    c = rng.standard_normal((2, 3)) + 1j * rng.standard_normal((2, 3))
    chunk = jax.jit(tile.chunk, static_argnums=2)(*np.complex64([log_a, c]), steps)
    u, state = rng.standard_normal((2, steps)), rng.standard_normal((2, 6))
    y = np.einsum("ht,hts->hs", u, chunk.toeplitz) + np.einsum("hn,hnt->ht", state, chunk.read)
    left = np.einsum("ht,htn->hn", u, chunk.write)
    h = state[:, :3] + 1j * state[:, 3:]
    left = left[:, :3] + 1j * left[:, 3:] + np.asarray(chunk.decay) * h
    for t in range(steps):
        h = np.exp(log_a) * h + u[:, t, None]
        testing.assert_close(y[:, t], 2 * (c * h).real.sum(-1), testing.FLOAT32_TOLERANCE)
    testing.assert_close(left, h, testing.FLOAT32_TOLERANCE)


def test_toeplitz():
    actual = tile.toeplitz(jnp.array([[1.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(actual[0], [[1, 2, 3], [0, 1, 2], [0, 0, 1]])


def test_planes_and_back():
    x = parameters(1.0).reshape(2, 100)
    np.testing.assert_array_equal(tile.to_complex(tile.to_planes(x)), x)


def planes(rng):
    return tuple(jnp.asarray(rng.standard_normal((4, 3)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("code", [None, 0, 1, 2, 3])
def test_a_step_back_is_the_derivative_of_a_step(code):
    """`retreat` against `jax.vjp` of `advance` and `contract`."""
    rng = np.random.default_rng(2)
    h, a, lacking, output_projection, carry = (planes(rng) for _ in range(5))
    u, dy = jnp.ones((1, 3)), jnp.full((1, 3), 0.7)
    code = None if code is None else jnp.full((1, 3), code, jnp.int32)

    def step(h, u):
        after = tile.advance(h, u, code, a, lacking)
        y = tile.contract(output_projection, after).sum(0, keepdims=True)
        return after, y

    # Planes of a cotangent are those of its conjugate: what JAX gives of a complex array.
    _, pullback = jax.vjp(step, h, u)
    skipped = code is not None and int(code[0, 0]) == 2
    dh, du = pullback(((carry[0], -carry[1]), jnp.zeros_like(dy) if skipped else dy))
    gradient, before = tile.retreat(carry, dy, code, output_projection, a, lacking)
    testing.assert_close((dh[0], -dh[1]), before, testing.FLOAT32_TOLERANCE)
    testing.assert_close(gradient[0].sum(0, keepdims=True), du, testing.FLOAT32_TOLERANCE)


def test_sensitivity_is_the_derivative_of_a_walk():
    rng = np.random.default_rng(3)
    log_a = jnp.asarray(-0.3 + 0.5j, jnp.complex64)
    inputs = jnp.asarray(rng.standard_normal(6), jnp.float32)
    codes = [0, 0, 1, 0, 2, 0]

    def walk(log_a):
        h = jnp.zeros((), jnp.complex64)
        for u, code in zip(inputs, codes, strict=True):
            after = (h * jnp.exp(log_a) if code != 1 else 0 * h) + u.astype(h.dtype)
            h = h if code == 2 else after
        return h

    value, tangent = jax.jvp(walk, (log_a,), (jnp.ones_like(log_a),))
    a = (jnp.exp(log_a).real[None, None], jnp.exp(log_a).imag[None, None])
    h = p = (jnp.zeros((1, 1)),) * 2
    for u, code in zip(inputs, codes, strict=True):
        code = jnp.full((1, 1), code, jnp.int32)
        p = tile.sensitivity(p, h, code, a)
        h = tile.advance(h, u[None, None], code, a)
    testing.assert_close(jax.lax.complex(*h)[0, 0], value, testing.FLOAT32_TOLERANCE)
    testing.assert_close(jax.lax.complex(*p)[0, 0], tangent, testing.FLOAT32_TOLERANCE)
