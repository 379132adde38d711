"""The TPU and GPU kernels, interpreted on the host: poisoned memory, bounds and races checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_conv1d import gpu, tile, tpu
from pallas_kernels.common import compat
from pallas_kernels.tools import testing
from tests.pallas_kernels.causal_conv1d.cases import Case, assert_isolated

# Small tiles: 3 blocks of time and 2 of channels, neither of which divides.
LENGTH, WIDTH = 37, {"tpu": 200, "gpu": 40}
TILES = {"tpu": tpu.Tiles(16, 128, 16), "gpu": gpu.Tiles(16, 32, 4)}


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def case_for(backend, **options):
    return Case(**({"length": LENGTH, "width": WIDTH[backend]} | options))


def interpreted(case, backend, tiles=None, **options):
    with testing.interpret():
        result = case.run(backend, tiles=tiles or TILES[backend], **options)
        return jax.tree.map(np.asarray, result)


# Each feature with each other at least once, not the full product: interpretation is slow.
FEATURES = [
    {},
    pytest.param({"packed": True}, marks=pytest.mark.full),
    {"conv_size": 1, "width": 3, "packed": True},
    pytest.param({"conv_size": 8, "activation": None, "packed": True}, marks=pytest.mark.full),
    pytest.param({"conv_size": 9, "width": 3}, marks=pytest.mark.full),
    pytest.param({"conv_size": 12, "width": 3, "packed": True}, marks=pytest.mark.full),
    {"dtype": "bfloat16", "packed": True},
    pytest.param({"length": 48, "width": 3, "activation": None}, marks=pytest.mark.full),
    {"length": 1, "width": 3},
    pytest.param({"length": 2, "width": 3, "conv_size": 7, "packed": True}, marks=pytest.mark.full),
]


@pytest.mark.always("bfloat16-True-tpu", "1-3-True-tpu", "plain-gpu", "1-3-True-gpu")
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize(
    "features", FEATURES, ids=lambda f: "-".join(map(str, f.values())) or "plain"
)
def test_kernels_equal_the_oracle(backend, features):
    case = case_for(backend, **features)
    narrow = features.get("dtype") == "bfloat16"
    tolerance = testing.BFLOAT16_TOLERANCE if narrow else testing.FLOAT32_TOLERANCE
    testing.assert_close(interpreted(case, backend), case.oracle(), tolerance)


@pytest.mark.always("gpu")
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_documents_are_isolated_to_the_bit(backend):
    case = case_for(backend, width=4)
    assert_isolated(functools.partial(interpreted, case, backend), case)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_the_same_call_twice_is_bitwise_equal(backend):
    case = case_for(backend, packed=True, width=4)
    once, twice = interpreted(case, backend), interpreted(case, backend)
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.full
def test_one_chunk_on_a_gpu():
    case, tiles = case_for("gpu", packed=True), gpu.Tiles(64, 32, 8)
    testing.assert_close(interpreted(case, "gpu", tiles), case.oracle(), testing.FLOAT32_TOLERANCE)


def broken_carry_not_reset(monkeypatch):
    monkeypatch.setattr(tpu, "sequence_begins", lambda: tpu.pl.program_id(0) < 0)


def broken_carry_shifted_by_one(monkeypatch):
    def leaving(groups):
        return [compat.tpu.roll(g, 1, 0) for g in groups[:-1]]

    monkeypatch.setattr(tpu, "_leaving", leaving)


def broken_edge_of_another_block(monkeypatch):
    def edge(dims):
        spec = tpu._edge_of(dims)
        return tpu.pl.BlockSpec(
            block_shape=spec.block_shape, index_map=lambda b, d, i: (b, dims.time(i), d)
        )

    monkeypatch.setattr(tpu, "_edge_of", tpu._edge, raising=False)
    monkeypatch.setattr(tpu, "_edge", edge)


@pytest.mark.always("broken_carry_not_reset")
@pytest.mark.parametrize(
    "mutant",
    [broken_carry_not_reset, broken_carry_shifted_by_one, broken_edge_of_another_block],
)
def test_mutants_are_caught(mutant, monkeypatch):
    case = case_for("tpu")
    expected = case.oracle()
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(interpreted(case, "tpu"), expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("by", [0, 1, 5, 8, 11, 16])
def test_rows_of_other_groups(by):
    rows = jnp.arange(48, dtype=jnp.float32)[:, None] * jnp.ones((1, 128))
    groups = [rows[i : i + 8] for i in range(0, 48, 8)]
    with testing.interpret():
        before = jax.jit(lambda *g: tpu.lag(list(g), by))(*groups[3::-1])
        after = jax.jit(lambda *g: tpu.lead(list(g), by))(*groups[2:])
    np.testing.assert_array_equal(before[:, 0], np.arange(24, 32) - by)
    np.testing.assert_array_equal(after[:, 0], np.arange(16, 24) + by)


def test_reach_and_ahead_of_short_documents():
    segment_index = jnp.array([[1, 1, 2, 3, 3, 3, 3, 3, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(tile.reach(segment_index, 4)[0], [3, 3, 0, 0, 1, 2, 3, 3, -1, -1])
    np.testing.assert_array_equal(tile.ahead(segment_index, 4)[0], [1, 0, 0, 3, 3, 2, 1, 0, -1, -1])
    [codes] = tpu._codes(segment_index, 4)
    decoded = jnp.where(codes < 0, codes, codes & 0xFFFF)[0, :, 0]
    np.testing.assert_array_equal(decoded, tile.reach(segment_index, 4)[0])
    np.testing.assert_array_equal((codes >> 16)[0, :, 0], tile.ahead(segment_index, 4)[0])


@pytest.mark.parametrize(("length", "width"), [(1, 1), (15, 60), (1000, 2560), (8192, 5376)])
@pytest.mark.parametrize("conv_size", [1, 4, 9, 30])
def test_tpu_tiles_fit_the_smallest_memory(length, width, conv_size):
    tiles = tpu.choose_tiles(length, width, conv_size)
    assert tiles.steps % tiles.slab == 0
    assert tiles.steps % (8 * -(-max(conv_size - 1, 1) // 8)) == 0
    assert tiles.width % 128 == 0
    assert tiles.width - 128 < width
    assert tpu.vmem_bytes(tiles, conv_size) <= 12 * 2**20


def test_the_tile_chooser_obeys_the_memory_estimator():
    free = tpu.choose_tiles(8192, 2560, 4)
    assert tpu.choose_tiles(8192, 2560, 4, tpu.vmem_bytes(free, 4) - 1).width < free.width
    with pytest.raises(ValueError, match="weight has 4 taps"):
        tpu.choose_tiles(8192, 2560, 4, 2**10)
