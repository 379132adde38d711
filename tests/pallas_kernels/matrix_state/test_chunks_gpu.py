"""Sums of log decays as GPU kernels make them, in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matrix_state import chunks, chunks_gpu
from pallas_kernels.tools import testing


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("size", [16, 64])
def test_sums_by_halves(size):
    g = -np.abs(np.random.default_rng(0).standard_normal((size, 3)))
    sums = jax.jit(chunks_gpu.BY_HALVES.up)(jnp.asarray(g, jnp.float32))
    for s, level in zip(chunks.sizes(size), sums.levels, strict=True):
        # First half: behind the token up to the half's end. Second: from its start to the token.
        blocks = g.reshape(-1, 2, s, 3)
        behind = np.cumsum(blocks[:, 0, ::-1], 1)[:, ::-1] - blocks[:, 0]
        expected = np.stack([behind, np.cumsum(blocks[:, 1], 1)], 1).reshape(size, 3)
        testing.assert_close(level, expected, 1e-6)
    testing.assert_close(sums.into, np.cumsum(g, 0), 1e-6)
    testing.assert_close(sums.out, np.cumsum(g[::-1], 0)[::-1] - g, 1e-6)
    testing.assert_close(sums.total, g.sum(0, keepdims=True), 1e-6)


def test_the_transpose_of_sums_by_halves():
    rng = np.random.default_rng(0)
    up, down = chunks_gpu.BY_HALVES
    g = normal(rng, 16, 3)
    cotangents = jax.tree.map(lambda x: normal(rng, *x.shape), jax.eval_shape(up, g))
    [expected] = jax.jit(lambda g, c: jax.vjp(up, g)[1](c))(g, cotangents)
    testing.assert_close(jax.jit(down)(cotangents), expected, 1e-6)


def test_halves_keep_an_infinite_gradient_with_the_tokens_it_sums():
    """Of a pair inside the first 4 of 16 tokens nothing reaches the others."""
    size = 16
    levels = [jnp.zeros((size, 1)) for _ in chunks.sizes(size)]
    levels[1] = levels[1].at[:4].set(jnp.inf)
    zero = jnp.zeros((size, 1))
    dg = jax.jit(chunks_gpu.BY_HALVES.down)(chunks.Sums(levels, zero, zero, zero[:1]))
    np.testing.assert_array_equal(dg[4:], zero[4:])


def test_pair_sums_are_sums_between_tokens():
    g = -np.random.default_rng(0).uniform(0, 3, 16)
    column = jnp.asarray(g[:, None], jnp.float32)
    sums = jax.jit(chunks_gpu.pair_sums)(column, column.reshape(1, -1))
    between = [[g[j + 1 : i + 1].sum() for j in range(16)] for i in range(16)]
    testing.assert_close(sums.between, np.array(between), 1e-6)
    testing.assert_close(sums.into[:, 0], np.cumsum(g), 1e-6)
    testing.assert_close(sums.out[:, 0], np.array([g[j + 1 :].sum() for j in range(16)]), 1e-6)
    testing.assert_close(sums.total, g.sum()[None, None], 1e-6)


def test_nothing_is_taken_from_a_sum_by_an_extreme_neighbour():
    column = jnp.full((16, 1), -104.0).at[8:].set(-1e-3)
    between = jax.jit(chunks_gpu.pair_sums)(column, column.reshape(1, -1)).between
    assert float(between[9, 8]) == np.float32(-1e-3)


def test_the_transpose_of_pair_sums():
    rng = np.random.default_rng(0)
    g = normal(rng, 16)

    def up(g):
        return chunks_gpu.pair_sums(g[:, None], g[None, :])

    sums = jax.tree.map(lambda x: normal(rng, *x.shape), up(g))
    sums = sums._replace(between=jnp.tril(sums.between, -1))
    [expected] = jax.jit(lambda g, c: jax.vjp(up, g)[1](c))(g, sums)
    testing.assert_close(chunks_gpu.pair_sums_transpose(sums)[0], expected, 1e-6)
