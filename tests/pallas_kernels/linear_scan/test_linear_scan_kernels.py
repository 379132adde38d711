"""The TPU and GPU kernels, interpreted on the host: poisoned memory, bounds and races checked."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.linear_scan import gpu, tpu
from pallas_kernels.tools import testing
from tests.pallas_kernels.linear_scan.cases import COMPLEX, Case, assert_isolated

# Small tiles: 3 blocks of time and 2 of channels, neither of which divides.
LENGTH, WIDTH = {"tpu": 37, "gpu": 37}, {"tpu": 200, "gpu": 40}
TILES = {"tpu": tpu.Tiles(16, 128), "gpu": gpu.Tiles(16, 32, 4)}


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def case_for(backend, **options):
    return Case(**({"length": LENGTH[backend], "width": WIDTH[backend]} | options))


def interpreted(case, backend, tiles=None, **options):
    with testing.interpret():
        result = case.run(backend, tiles=tiles or TILES[backend], **options)
        return jax.tree.map(np.asarray, result)


# Each feature with each other at least once, not the full product: interpretation is slow.
FEATURES = [
    {},
    pytest.param({"reverse": True}, marks=pytest.mark.full),
    pytest.param({"dtype": COMPLEX, "packed": True}, marks=pytest.mark.full),
    pytest.param({"dtype": COMPLEX, "constant": True, "reverse": True}, marks=pytest.mark.full),
    pytest.param({"packed": True, "reverse": True}, marks=pytest.mark.full),
    pytest.param({"constant": True, "packed": True}, marks=pytest.mark.full),
    {"dtype": "bfloat16", "packed": True},
    {"length": 48, "packed": True, "constant": True, "reverse": True, "dtype": COMPLEX},
    {"length": 1, "width": 3},
    pytest.param({"length": 2, "packed": True, "dtype": COMPLEX}, marks=pytest.mark.full),
    pytest.param({"length": 15, "reverse": True}, marks=pytest.mark.full),
]


@pytest.mark.always("48-True-True-True-complex64-tpu", "48-True-True-True-complex64-gpu")
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize(
    "features", FEATURES, ids=lambda f: "-".join(map(str, f.values())) or "plain"
)
def test_kernels_equal_the_oracle(backend, features):
    case = case_for(backend, **features)
    narrow = features.get("dtype") == "bfloat16"
    tolerance = testing.BFLOAT16_TOLERANCE if narrow else testing.FLOAT32_TOLERANCE
    testing.assert_close(interpreted(case, backend), case.oracle(), tolerance)


@pytest.mark.always("True-tpu", "True-gpu")
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize("reverse", [False, True])
def test_documents_are_isolated_to_the_bit(backend, reverse):
    case = case_for(backend, reverse=reverse, width=4)
    run = functools.partial(interpreted, case, backend)
    assert_isolated(run, case)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_the_same_call_twice_is_bitwise_equal(backend):
    case = case_for(backend, dtype=COMPLEX, packed=True, width=4)
    once, twice = interpreted(case, backend), interpreted(case, backend)
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(x, y)


def test_one_chunk_on_a_gpu_that_the_batch_fills():
    case, tiles = case_for("gpu", packed=True), gpu.Tiles(64, 32, 4)
    testing.assert_close(interpreted(case, "gpu", tiles), case.oracle(), testing.FLOAT32_TOLERANCE)


def broken_carry_not_reset(monkeypatch):
    monkeypatch.setattr(tpu, "sequence_begins", lambda: tpu.pl.program_id(0) < 0)


def broken_carry_shifted_by_one(monkeypatch):
    monkeypatch.setattr(tpu._Group, "last", lambda self, x: tuple(p[3:4] for p in x))


@pytest.mark.always("broken_carry_not_reset")
@pytest.mark.parametrize("mutant", [broken_carry_not_reset, broken_carry_shifted_by_one])
def test_mutants_are_caught(mutant, monkeypatch):
    case = case_for("tpu")
    expected = case.oracle()
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(interpreted(case, "tpu"), expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("length", "width"), [(1, 1), (15, 60), (1000, 2560), (8192, 1024)])
@pytest.mark.parametrize("planes", [1, 2])
def test_tpu_tiles_fit_the_smallest_memory(length, width, planes):
    tiles = tpu.choose_tiles(length, width, planes)
    assert tiles.steps % 16 == 0
    assert tiles.width % 128 == 0
    assert tiles.width - 128 < width
    assert tpu.vmem_bytes(tiles, planes) <= 12 * 2**20


def test_tpu_tiles_shrink_with_the_memory():
    tiles = tpu.choose_tiles(8192, 1024, 1, 2**21)
    assert tpu.vmem_bytes(tiles, 1) <= 2**21
    assert tiles.width < 1024
