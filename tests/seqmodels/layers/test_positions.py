"""Positions of any size, and rotations by them, against integers and float80."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.layers.positions import clipped, further
from seqmodels.layers.rotary import rotary
from tests import tolerances

FAR = [0, 1, 1000, 10**6, 2**24, 2**24 + 12_345, 2**30 + 7, 2**31 - 1, 2**31]


def as_int32(positions):
    return jnp.asarray(np.asarray(positions, np.uint32).view(np.int32))


@pytest.mark.parametrize(("base", "size"), [(1e4, 64), (1e6, 8), (0.5, 4)])
def test_angles_are_exact(base, size):
    pairs = size // 2
    x = jnp.concatenate([jnp.ones((1, len(FAR), 1, pairs)), jnp.zeros((1, len(FAR), 1, pairs))], -1)
    y = np.asarray(jax.jit(rotary, static_argnums=2)(x, as_int32([FAR]), base))[0, :, 0]
    # Positions times frequencies; exact enough in float64 if turns are taken off by halves.
    frequency = base ** (-2.0 * np.arange(pairs) / size)
    angle = np.zeros((len(FAR), pairs))
    for bit in range(32):
        part = np.float64(2**bit) * frequency.astype(np.longdouble) % (2 * np.pi)
        on = (np.asarray(FAR, np.int64) >> bit & 1)[:, None]
        angle = (angle + on * part.astype(np.float64)) % (2 * np.pi)
    np.testing.assert_allclose(y[:, :pairs], np.cos(angle), **tolerances.EACH_FLOAT32_OUTPUT)
    np.testing.assert_allclose(y[:, pairs:], np.sin(angle), **tolerances.EACH_FLOAT32_OUTPUT)


@pytest.mark.parametrize("start", [2**24, 2**31 - 40, 2**31 + 10, 2**32 - 40])
def test_angles_between_tokens_are_those_at_the_start(start):
    size = 32
    x = jax.random.normal(jax.random.key(0), (1, 80, 1, size))
    count = jnp.arange(80, dtype=jnp.int32)[None]
    scores = []
    for first in (0, start):
        y = rotary(x, further(jnp.broadcast_to(as_int32([[first]]), count.shape), count))
        scores.append(jnp.einsum("bqhk,bshk->bhqs", y, y, precision="highest"))
    np.testing.assert_allclose(
        scores[1], scores[0], atol=tolerances.FLOAT32_OF_LARGEST * np.abs(scores[0]).max()
    )


def test_positions_count_up_and_never_come_back():
    most = 2**31 - 1
    position = jnp.asarray([0, most - 2, most, -5, -1], jnp.int32)
    found = further(position, jnp.full_like(position, 3))
    np.testing.assert_array_equal(found, [3, -(2**31), -(2**31) + 2, -2, -(2**31) + 2])
    assert further(position[2], jnp.asarray(most, jnp.int32)) == -2
    np.testing.assert_array_equal(clipped(found), [3, most, most, most, most])
