"""The loss in tiles on a mesh: that of one device, and what moves for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.parallel import make_mesh, on_mesh, put_batch, replicated
from seqmodels.training.cross_entropy import tiled_sums
from tests import tolerances
from tests.seqmodels.parallel.hlo import collectives
from tests.tiers import one_of_many

ROWS, LENGTH, WIDTH = 4, 16, 5


def batch(vocabulary):
    rng = np.random.default_rng(vocabulary)
    targets = rng.integers(0, vocabulary, (ROWS, LENGTH)).astype(np.int32)
    # Of some shards no token counts, of others only some, and most tokens are of one weight.
    counted = np.arange(LENGTH) < np.array([[16], [9], [3], [0]])
    weights = counted * (1 + 0.5 * (targets == 1)).astype(np.float32)
    x = rng.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
    x[-1] = np.nan  # where nothing counts there may be anything
    return {"inputs": targets, "targets": targets, "weights": weights.astype(np.float32), "x": x}


def project(table, x):
    return 3 * jnp.tanh(jnp.dot(x, table.T, preferred_element_type=jnp.float32))


def run(tile, table, rows):
    def mean(table, x):
        sums = tiled_sums(project, table, x, rows["targets"], rows["weights"], tile=tile)
        return sums.loss / sums.weight, sums

    clean = jnp.where(rows["weights"][..., None] > 0, rows["x"], 0.0)
    return jax.value_and_grad(mean, (0, 1), has_aux=True)(table, clean)


def table_of(vocabulary):
    table = np.random.default_rng(0).standard_normal((vocabulary, WIDTH)).astype(np.float32)
    table[1::2] = table[::2]  # equal logits: the first one is the prediction
    return table


@pytest.mark.parametrize(
    ("sizes", "vocabulary", "tile"),
    one_of_many(
        [
            (sizes, vocabulary, tile)
            for sizes in ((2, 2, 2), (1, 1, 8), (1, 8, 1))
            for vocabulary in (8, 22)
            for tile in (3, None)
        ],
        [((2, 2, 2), 8, 3)],
    ),
)
def test_on_a_mesh_the_loss_is_that_of_one_device(sizes, vocabulary, tile):
    table, rows = table_of(vocabulary), batch(vocabulary)
    expected = jax.jit(functools.partial(run, None))(table, rows)
    mesh = make_mesh(*sizes)
    split = jax.jit(on_mesh(functools.partial(run, tile), mesh))
    actual = split(jax.device_put(table, replicated(mesh)), put_batch(rows, mesh))
    testing.assert_close(actual, expected, tolerances.FLOAT32)


def test_the_gradient_of_the_table_is_summed_once_and_no_logits_move():
    mesh = make_mesh(2, 2, 2)
    table = jax.device_put(table_of(512), replicated(mesh))
    moved = collectives(
        jax.jit(on_mesh(functools.partial(run, 2), mesh)), table, put_batch(batch(512), mesh)
    )
    assert set(moved) == {"all-reduce"}
    own = 256 * WIDTH * 4  # bytes of a device's part of the table
    assert own <= moved["all-reduce"][1] < 1.5 * own
