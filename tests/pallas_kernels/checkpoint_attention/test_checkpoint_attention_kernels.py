"""The TPU and GPU kernels, interpreted on the host."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checkpoint_attention import gpu, tpu, tpu_layout
from pallas_kernels.checkpoint_attention.shapes import SHAPES
from pallas_kernels.common import compat
from pallas_kernels.tools import testing
from tests import tolerances
from tests.pallas_kernels.checkpoint_attention.cases import Case, assert_isolated

BACKENDS = ("tpu", "gpu")
CHIPS = {
    "v5e": compat.tpu.ChipVersion.TPU_V5E,
    "v5p": compat.tpu.ChipVersion.TPU_V5P,
    "v6e": compat.tpu.ChipVersion.TPU_V6E,
    "tpu7x": compat.tpu.ChipVersion.TPU_7X,
}
# 3 blocks of tokens and 2 or 3 of slots, 2 heads; no length and no width divides.
SMALL = {"length": 41, "interval": 2, "heads": 2, "batch": 1}
TILES = {"tpu": tpu.Limits(tokens=16, slots=8, lanes=8), "gpu": gpu.Tiles(16, 8, 4)}


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def interpreted(case, backend, tiles=None):
    with testing.interpret():
        return jax.tree.map(np.asarray, case.run(backend, tiles or TILES[backend]))


# Each feature with each other at least once, not the full product: interpretation is slow.
FEATURES = {
    "plain": {"batch": 2},
    "packed-past-grouped": {"packed": True, "past": 5, "past_length": [3], "heads": 4, "groups": 2},
    "past-alone": {"own": False, "past": 13, "past_length": [5, 0], "batch": 2},
}


@pytest.mark.always("packed-past-grouped-tpu", "packed-past-grouped-gpu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FEATURES)
def test_kernels_equal_the_oracle(name, backend):
    case = Case(**(SMALL | FEATURES[name]))
    testing.assert_close(interpreted(case, backend), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("packed", [False, True])
def test_several_strips_of_slots(packed):
    """Keys of 4 strips, each with 2 steps."""
    tiles = TILES["tpu"]._replace(tokens=32, strip=16)
    case = Case(**(SMALL | {"interval": 1, "heads": 1, "packed": packed}))
    testing.assert_close(interpreted(case, "tpu", tiles), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.always("gpu")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_against_the_float32_oracle(backend):
    case = Case(**(SMALL | {"dtype": "bfloat16", "heads": 1, "key_size": 32, "value_size": 16}))
    actual, expected = interpreted(case, backend), case.oracle()
    assert [x.dtype.name for x in actual["outputs"]] == ["bfloat16", "float32"]
    testing.assert_close(actual["outputs"], expected["outputs"], tolerances.BFLOAT16)
    testing.assert_close(actual["gradients"], expected["gradients"], tolerances.BFLOAT16_GRADIENTS)


@pytest.mark.always("gpu")
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_are_isolated_to_the_bit(backend):
    case = Case(**(SMALL | {"heads": 1, "past": 2}))
    assert_isolated(lambda case: interpreted(case, backend), case)


@pytest.mark.full
def test_the_same_call_twice_is_bitwise_equal():
    case = Case(**(SMALL | {"heads": 1, "packed": True}))
    once, twice = (interpreted(case, "tpu") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, twice)


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=3)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), padding=st.integers(0, 20)
)
def test_any_segmentation(backend, lengths, padding):
    ids = np.repeat(np.arange(len(lengths)) + 1, lengths)[: 41 - padding]
    ids = np.pad(ids, (0, 41 - len(ids)))
    case = Case(**(SMALL | {"heads": 1}))
    case = case.replaced(segment_ids=jnp.asarray(ids[None], jnp.int32))
    testing.assert_close(interpreted(case, backend), case.oracle(), testing.FLOAT32_TOLERANCE)


def tpu_sums_not_reset(monkeypatch):
    monkeypatch.setattr(tpu, "begins", lambda at: at.row < 0)


def tpu_slots_shifted_by_one(monkeypatch):
    visible = tpu.visible

    def shifted(dims, step, count):
        return visible(dims, step._replace(base=step.base + 1), count)

    monkeypatch.setattr(tpu, "visible", shifted)


def gpu_slots_shifted_by_one(monkeypatch):
    visible = gpu.visible
    monkeypatch.setattr(gpu, "visible", lambda dims, tokens, slot: visible(dims, tokens, slot + 1))


@pytest.mark.always("tpu_sums_not_reset", "gpu_slots_shifted_by_one")
@pytest.mark.parametrize(
    "mutant", [tpu_sums_not_reset, tpu_slots_shifted_by_one, gpu_slots_shifted_by_one]
)
def test_mutants_are_caught(mutant, monkeypatch):
    case = Case(**(SMALL | {"heads": 1}))
    expected = case.oracle()
    mutant(monkeypatch)
    actual = interpreted(case, mutant.__name__[:3])
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


# Memory, and what tiles are chosen.


def job_of(shape):
    keys, values = (-(-size // 128) * 128 for size in (shape.key_size, shape.value_size))
    tokens, slots = tpu.Limits().tokens, tpu.Limits().slots
    length = -(-shape.length // tokens) * tokens
    count = -(-(shape.length // shape.interval + shape.past) // slots) * slots
    sizes = (shape.batch, length, count, shape.groups, shape.heads, keys, values, shape.interval)
    tiles = tpu_layout.Tiles(tokens, slots, count)
    return tpu_layout.KernelShape(*sizes, 1.0, True, False, jnp.dtype(shape.dtype), tiles)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_tiles_fit_every_generation(chip, name):
    dims = job_of(SHAPES[name])
    tiles = tpu_layout.choose_tiles(dims, tpu.Limits())
    dims = dims._replace(tiles=tiles, slots=-(-dims.slots // tiles.strip) * tiles.strip)
    capacity = compat.tpu.get_tpu_info_for_chip(CHIPS[chip], 1).vmem_capacity_bytes
    assert tpu_layout.vmem_bytes(dims) <= capacity // 2
    assert dims.strips * dims.steps * tiles.slots == dims.slots


def test_strips_are_alike_and_hold_little_that_is_not_there():
    dims = job_of(SHAPES["long"])._replace(slots=7 * 512)
    for strip, blocks in ((None, 7), (4 * 512, 4), (3 * 512, 3), (2 * 512, 2)):
        tiles = tpu_layout.choose_tiles(dims, tpu.Limits(strip=strip))
        assert tiles.strip == blocks * 512


def test_the_chooser_obeys_the_estimator():
    dims = job_of(SHAPES["long"])
    dims = dims._replace(tiles=tpu_layout.choose_tiles(dims, tpu.Limits()))
    budget = tpu_layout.vmem_bytes(dims) - 1
    tight = tpu_layout.choose_tiles(dims, tpu.Limits(vmem_bytes=budget))
    assert tight.strip < dims.tiles.strip
    assert tpu_layout.vmem_bytes(dims._replace(tiles=tight)) <= budget


def test_what_does_not_fit_vmem_is_refused():
    with pytest.raises(ValueError, match="K=128 and V=128 does not fit"):
        jax.eval_shape(lambda: Case(**SMALL).run("tpu", tpu.Limits(vmem_bytes=2**16)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gpu_tiles_are_powers_of_two_that_registers_hold(shape):
    narrow = shape.dtype == "bfloat16"
    sizes = shape.length, shape.length // shape.interval, shape.key_size, shape.value_size
    tiles = gpu.choose_tiles(*sizes, narrow=narrow)
    assert all(size & (size - 1) == 0 and size >= 16 for size in tiles[:2])
    assert tiles.tokens * (tiles.slots + shape.value_size) <= 32 * tiles.warps * 128
