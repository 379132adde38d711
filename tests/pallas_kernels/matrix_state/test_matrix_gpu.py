"""Sums of log decays as GPU kernels make them, in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matrix_state import decay_sums, masks
from pallas_kernels.matrix_state import gpu as matrix_gpu
from pallas_kernels.tools import testing
from tests import tolerances


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("size", [16, 64])
def test_sums_by_halves(size):
    g = -np.abs(np.random.default_rng(0).standard_normal((size, 3)))
    sums = jax.jit(matrix_gpu.SUMMATION.cumsum)(jnp.asarray(g, jnp.float32))
    for s, level in zip(masks.level_sizes(size), sums.level_sums, strict=True):
        # First half: behind the token up to the half's end. Second: from its start to the token.
        blocks = g.reshape(-1, 2, s, 3)
        behind = np.cumsum(blocks[:, 0, ::-1], 1)[:, ::-1] - blocks[:, 0]
        expected = np.stack([behind, np.cumsum(blocks[:, 1], 1)], 1).reshape(size, 3)
        testing.assert_close(level, expected, tolerances.FLOAT32_TERMS)
    testing.assert_close(sums.g_cumsum, np.cumsum(g, 0), tolerances.FLOAT32_TERMS)
    testing.assert_close(sums.g_to_end, np.cumsum(g[::-1], 0)[::-1] - g, tolerances.FLOAT32_TERMS)
    testing.assert_close(sums.g_last, g.sum(0, keepdims=True), tolerances.FLOAT32_TERMS)


def test_the_transpose_of_sums_by_halves():
    rng = np.random.default_rng(0)
    up, down = matrix_gpu.SUMMATION
    g = normal(rng, 16, 3)
    cotangents = jax.tree.map(lambda x: normal(rng, *x.shape), jax.eval_shape(up, g))
    [expected] = jax.jit(lambda g, c: jax.vjp(up, g)[1](c))(g, cotangents)
    testing.assert_close(jax.jit(down)(cotangents), expected, tolerances.FLOAT32_TERMS)


def test_halves_keep_an_infinite_gradient_with_the_tokens_it_sums():
    """Nothing of a pair inside the first 4 of 16 tokens reaches the others."""
    size = 16
    levels = [jnp.zeros((size, 1)) for _ in masks.level_sizes(size)]
    levels[1] = levels[1].at[:4].set(jnp.inf)
    zero = jnp.zeros((size, 1))
    dg = jax.jit(matrix_gpu.SUMMATION.cumsum_vjp)(
        decay_sums.DecaySums(levels, zero, zero, zero[:1])
    )
    np.testing.assert_array_equal(dg[4:], zero[4:])


def test_pair_sums_are_sums_between_tokens():
    g = -np.random.default_rng(0).uniform(0, 3, 16)
    column = jnp.asarray(g[:, None], jnp.float32)
    sums = jax.jit(matrix_gpu.pair_sums)(column, column.reshape(1, -1))
    between = [[g[j + 1 : i + 1].sum() for j in range(16)] for i in range(16)]
    testing.assert_close(sums.g_between, np.array(between), tolerances.FLOAT32_TERMS)
    testing.assert_close(sums.g_cumsum[:, 0], np.cumsum(g), tolerances.FLOAT32_TERMS)
    testing.assert_close(
        sums.g_to_end[:, 0],
        np.array([g[j + 1 :].sum() for j in range(16)]),
        tolerances.FLOAT32_TERMS,
    )
    testing.assert_close(sums.g_last, g.sum()[None, None], tolerances.FLOAT32_TERMS)


def test_nothing_is_taken_from_a_sum_by_an_extreme_neighbour():
    column = jnp.full((16, 1), -104.0).at[8:].set(-1e-3)
    between = jax.jit(matrix_gpu.pair_sums)(column, column.reshape(1, -1)).g_between
    assert float(between[9, 8]) == np.float32(-1e-3)


def test_the_transpose_of_pair_sums():
    rng = np.random.default_rng(0)
    g = normal(rng, 16)

    def up(g):
        return matrix_gpu.pair_sums(g[:, None], g[None, :])

    sums = jax.tree.map(lambda x: normal(rng, *x.shape), up(g))
    sums = sums._replace(g_between=jnp.tril(sums.g_between, -1))
    [expected] = jax.jit(lambda g, c: jax.vjp(up, g)[1](c))(g, sums)
    testing.assert_close(matrix_gpu.pair_sums_vjp(sums)[0], expected, tolerances.FLOAT32_TERMS)
