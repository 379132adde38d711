"""Segment masks and sums of log decays inside one chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import segments
from pallas_kernels.matrix_state import decay_sums, masks
from tests import tolerances


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


SUMMATIONS = {
    "halves": decay_sums.BY_HALVES,
    "rolls": decay_sums.summation(decay_sums.by_rolls(jnp.roll, below=4)),
}


@pytest.mark.parametrize("kind", SUMMATIONS)
@pytest.mark.parametrize("size", [1, 2, 16])
def test_decay_between_every_two_tokens(kind, size):
    g = -np.random.default_rng(0).uniform(0, 2, (size, 3)).astype(np.float32)
    sums = jax.jit(SUMMATIONS[kind].cumsum)(g)
    total = np.cumsum(g.astype(np.float64), 0)
    np.testing.assert_allclose(sums.g_cumsum, total, **tolerances.EACH_FLOAT32_TERMS)
    np.testing.assert_allclose(
        sums.g_to_end, total[-1] - total, **tolerances.EACH_FLOAT32_TERMS_OF_ONE
    )
    np.testing.assert_allclose(sums.g_last[0], total[-1], **tolerances.EACH_FLOAT32_TERMS)
    seen = np.eye(size, dtype=bool)
    for s, level in zip(masks.level_sizes(size), np.asarray(sums.level_sums), strict=True):
        parted = np.asarray(masks.parted(size, s))
        assert not (seen & parted).any()
        seen |= parted
        for i, j in np.argwhere(parted):
            np.testing.assert_allclose(
                level[i] + level[j], total[i] - total[j], **tolerances.EACH_FLOAT32_SUM
            )
    np.testing.assert_array_equal(seen, np.tri(size, dtype=bool))


@pytest.mark.parametrize("kind", SUMMATIONS)
def test_down_is_the_transpose_of_up(kind):
    rng = np.random.default_rng(1)
    g = -rng.uniform(0, 2, (16, 3)).astype(np.float32)
    up, down = SUMMATIONS[kind]
    sums = jax.eval_shape(up, g)
    cotangents = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), sums)
    expected = jax.jit(lambda g, cotangents: jax.vjp(up, g)[1](cotangents)[0])(g, cotangents)
    np.testing.assert_allclose(jax.jit(down)(cotangents), expected, **tolerances.EACH_FLOAT32_LAYER)


@pytest.mark.parametrize("kind", SUMMATIONS)
def test_an_extreme_decay_takes_no_digits_from_its_neighbours(kind):
    g = np.float32([-1e-6, -104.0, -1e-6, -2e-6] * 4)[:, None]
    levels = np.asarray(jax.jit(SUMMATIONS[kind].cumsum)(g).level_sums)
    np.testing.assert_array_equal(levels[0][3], g[3])  # 3 and 2 part at 1
    np.testing.assert_array_equal(levels[0][2], 0)


def test_documents():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 0], [5, 5, 5, 5, 5, 5, 5, 5]], jnp.int32)
    segment_index = segments.index(ids)
    entering = masks.entering_segment(segment_index, 4)
    np.testing.assert_array_equal(entering, [[1, 2], [1, 1]])

    def docs(row, chunk):
        r = segment_index[row, 4 * chunk : 4 * chunk + 4]
        return masks.segment_masks(r[:, None], r[None], entering[row, chunk][None, None])

    second = docs(0, 1)
    np.testing.assert_array_equal(second.entering[:, 0], [True, False, False, False])
    np.testing.assert_array_equal(second.leaving[:, 0], [False, True, True, False])
    np.testing.assert_array_equal(second.real[:, 0], [True, True, True, False])
    assert not second.carried.item()
    assert docs(1, 1).carried.item()
    np.testing.assert_array_equal(
        masks.within(jnp.ones((4, 4), bool), second),
        [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
    )


def test_a_row_of_padding_keeps_the_first_run():
    np.testing.assert_array_equal(masks.entering_segment(jnp.zeros((1, 8), jnp.int32), 4), [[1, 1]])


def test_clamped_decays_have_no_gradient():
    g = jnp.asarray([[-1.0], [-1e4], [-2.0]], jnp.float32)
    np.testing.assert_array_equal(decay_sums.clamp(g, None)[:, 0], [-1, -104, -2])
    np.testing.assert_array_equal(decay_sums.clamp_vjp(g, g * 0 + 1, None)[:, 0], [1, 0, 1])
