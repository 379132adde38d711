"""The TPU kernels: interpreted on the host, and the memory of their tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import compat
from pallas_kernels.selective_scan import tpu
from pallas_kernels.selective_scan.shapes import SHAPES
from pallas_kernels.selective_scan.tile import Config
from pallas_kernels.tools import testing
from tests.pallas_kernels.selective_scan.cases import Case, assert_isolated

# Small tiles: 3 blocks of time; a width of 200 makes 2 strips. Neither divides.
LENGTH, STATES, TILES = 21, 2, tpu.Tiles(8, 128, group=8)


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def case_of(**options):
    return Case(**({"length": LENGTH, "width": 5, "states": STATES, "batch": 1} | options))


def interpreted(case, tiles=TILES, **options):
    with testing.interpret():
        return jax.tree.map(np.asarray, case.run("tpu", tiles=tiles, **options))


# Each feature with most others, not the full product: interpretation is slow.
FEATURES = [
    {"batch": 2, "width": 200, "packed": True},
    {"reverse": True, "packed": True, "states": 3},
    {"full": False, "reverse": True, "length": 16, "width": 130},
    {"dtype": "bfloat16", "length": 2, "batch": 2},
]


@pytest.mark.always("reverse-packed-states")
@pytest.mark.parametrize("features", FEATURES, ids=lambda f: "-".join(map(str, f)))
def test_kernels_equal_the_oracle(features):
    case = case_of(**features)
    narrow = features.get("dtype") == "bfloat16"
    tolerance = testing.BFLOAT16_TOLERANCE if narrow else testing.FLOAT32_TOLERANCE
    testing.assert_close(interpreted(case), case.oracle(), tolerance)


@pytest.mark.full
def test_a_strip_of_six_lane_tiles_and_two_groups_at_once():
    case, tiles = case_of(full=False, length=15, width=700), tpu.Tiles(16, 768, group=8)
    testing.assert_close(interpreted(case, tiles), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_extreme_decays_have_finite_gradients():
    case = case_of(full=False, length=16)
    case.args["A"] = jnp.full_like(case.args["A"], -1e4)
    case.args["dt"] = case.args["dt"].at[:, ::2].set(100.0)
    testing.assert_close(interpreted(case), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("reverse", [False, True])
def test_documents_are_isolated_to_the_bit(reverse):
    case = case_of(reverse=reverse, states=1)
    assert_isolated(functools.partial(interpreted, case), case)


@pytest.mark.full
def test_the_same_call_twice_is_bitwise_equal():
    case = case_of(packed=True, full=False, length=9, states=1)
    once, twice = interpreted(case), interpreted(case)
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(x, y)


def broken_carry_not_reset(monkeypatch):
    monkeypatch.setattr(tpu, "sequence_begins", lambda: tpu.pl.program_id(0) < 0)


def broken_carry_shifted_by_one(monkeypatch):
    whole = tpu._advance_states

    def shifted(refs, dims, *args, **options):
        return whole(refs, dims, *args[:-1], [jnp.roll(h, 1, 1) for h in args[-1]], **options)

    monkeypatch.setattr(tpu, "_advance_states", shifted)


@pytest.mark.always("broken_carry_not_reset")
@pytest.mark.parametrize("mutant", [broken_carry_not_reset, broken_carry_shifted_by_one])
def test_mutants_are_caught(mutant, monkeypatch):
    case = case_of(full=False, batch=2)
    expected = case.oracle()["outputs"]
    mutant(monkeypatch)
    with testing.interpret():
        arrays = (*case.args.values(), None)
        outputs = jax.jit(lambda *a: tpu.BACKEND(Config(False, False, TILES), *a))(*arrays)
        outputs = jax.tree.map(np.asarray, outputs)
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(outputs, expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_states_of_the_next_block_are_caught():
    case = case_of(full=False, length=16)
    expected = [case.oracle()["gradients"][name] for name in ("dt", "A", "C")]
    config = Config(False, False, TILES)

    def gradients(*arrays):
        _, kept = tpu.forward(config, *arrays, None, return_residuals=True)
        *residuals, boundaries, segment_index = kept
        residuals = (*residuals, jnp.roll(boundaries, 1, 1), segment_index)
        _, dt, A, _, C, *_ = tpu.backward(config, residuals, case.cotangents)
        return dt, A, C

    with testing.interpret():
        actual = jax.tree.map(np.asarray, jax.jit(gradients)(*case.args.values()))
    with pytest.raises(AssertionError, match=r"\d > "):
        testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_tiles_fit_every_generation(chip, name):
    shape = SHAPES[name]
    tiles = tpu.choose_tiles(shape.length, shape.width, shape.states)
    version = {
        "v5e": compat.tpu.ChipVersion.TPU_V5E,
        "v5p": compat.tpu.ChipVersion.TPU_V5P,
        "v6e": compat.tpu.ChipVersion.TPU_V6E,
        "tpu7x": compat.tpu.ChipVersion.TPU_7X,
    }[chip]
    capacity = compat.tpu.get_tpu_info_for_chip(version, 1).vmem_capacity_bytes
    assert tpu.vmem_bytes(tiles, shape.states) <= capacity // 2
    assert tiles.steps % 16 == 0
    assert tiles.width % 128 == 0


def test_the_chooser_obeys_the_estimator():
    roomy = tpu.choose_tiles(4096, 2048, 16)
    assert roomy == tpu.Tiles(128, 1024)
    budget = tpu.vmem_bytes(roomy, 16) - 1
    tight = tpu.choose_tiles(4096, 2048, 16, budget)
    assert tight != roomy
    assert tpu.vmem_bytes(tight, 16) <= budget
    with pytest.raises(ValueError, match="N=16"):
        tpu.choose_tiles(4096, 2048, 16, 0)
