"""The recurrence with its projections: block by block = all of the time at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels import ops
from seqmodels.mixers import Segments, mimo_scan

WIDTH, STATES = 3, 4


def arguments(batch, length):
    rng = np.random.default_rng(length)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    decay = np.exp(rng.uniform(-0.5, -1e-3, STATES) + 1j * rng.uniform(0, 3, STATES))
    u, into, out = (
        normal(batch, length, WIDTH), normal(WIDTH, 2 * STATES), normal(4 * STATES, WIDTH)
    )  # fmt: skip
    return u, jnp.asarray(decay, jnp.complex64), into, out


def value_and_gradients(fn):
    @jax.jit
    def run(args, cotangent):
        y, pullback = jax.vjp(fn, *args)
        return y, pullback(cotangent)

    return run


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 63), (3, 300), (20, 260)])
def test_blocks_equal_scans(batch, length):
    args = arguments(batch, length)
    cotangent = jnp.cos(jnp.arange(args[0].size, dtype=jnp.float32)).reshape(args[0].shape)
    with jax.numpy_dtype_promotion("strict"):
        actual = value_and_gradients(ops.mimo_blocks)(args, cotangent)
        expected = value_and_gradients(mimo_scan.by_scans)(args, cotangent)
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


def test_documents_and_padding():
    u, *shared = arguments(2, 40)
    ids = jnp.asarray([[1] * 15 + [2] * 25, [1] * 40], jnp.int32)
    both = jax.jit(mimo_scan.bidirectional_mimo_scan)
    packed = both(u, *shared, Segments.from_ids(ids))
    alone = both(u[:1, 15:], *shared, None)
    testing.assert_close(packed[:1, 15:], alone, testing.FLOAT32_TOLERANCE)
    one = Segments.from_ids(jnp.asarray([[1] * 15 + [0] * 25, [1] * 40], jnp.int32), single=True)
    padded = both(u, *shared, one)
    testing.assert_close(padded[0, :15], packed[0, :15], testing.FLOAT32_TOLERANCE)


def test_a_cpu_takes_blocks_where_states_are_many(monkeypatch):
    args = arguments(2, 300)
    expected = jax.jit(ops.mimo_blocks)(*args)
    monkeypatch.setattr(mimo_scan, "_LARGE", 2 * 300 * STATES)
    np.testing.assert_array_equal(jax.jit(mimo_scan.bidirectional_mimo_scan)(*args, None), expected)
    monkeypatch.setattr(mimo_scan, "_LARGE", 2 * 300 * STATES + 1)
    scanned = jax.jit(lambda *a: mimo_scan.bidirectional_mimo_scan(*a, None))(*args)
    np.testing.assert_array_equal(scanned, jax.jit(mimo_scan.by_scans)(*args))
