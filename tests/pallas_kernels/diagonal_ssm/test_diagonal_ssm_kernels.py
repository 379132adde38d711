"""The TPU and GPU kernels, interpreted on the host: poisoned memory, bounds and races checked."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.diagonal_ssm import gpu, tpu
from pallas_kernels.tools import testing
from tests.pallas_kernels.diagonal_ssm.cases import Case, assert_isolated

# Small tiles: 3 blocks of time and 2 strips of channels, neither of which divides.
LENGTH, WIDTH = 37, {"tpu": 130, "gpu": 20}
TILES = {"tpu": tpu.Tiles(16), "gpu": gpu.Tiles(16, 16, 4)}


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def case_for(backend, **options):
    return Case(**({"length": LENGTH, "width": WIDTH[backend], "states": 3} | options))


def interpreted(case, backend, tiles=None, **options):
    with testing.interpret():
        result = case.run(backend, tiles=tiles or TILES[backend], **options)
        return jax.tree.map(np.asarray, result)


# Each feature with each other at least once, not the full product: interpretation is slow.
FEATURES = [
    {},
    {"packed": True, "reverse": True},
    {"length": 48, "packed": True, "width": 3, "states": 9},
    {"length": 1, "width": 3},
]


@pytest.mark.always("True-True-gpu", "True-True-tpu")
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize(
    "features", FEATURES, ids=lambda f: "-".join(map(str, f.values())) or "plain"
)
def test_kernels_equal_the_oracle(backend, features):
    case = case_for(backend, **features)
    testing.assert_close(interpreted(case, backend), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_bfloat16(backend):
    case = case_for(backend, dtype="bfloat16", width=3)
    full = case_for(backend, width=3)
    case.args = (case.args[0], *full.args[1:])
    case.cotangents = (case.cotangents[0], full.cotangents[1])
    testing.assert_close(interpreted(case, backend), case.oracle(), testing.BFLOAT16_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_documents_are_isolated_to_the_bit(backend):
    case = case_for(backend, width=3, reverse=backend == "gpu")
    assert_isolated(functools.partial(interpreted, case, backend), case)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_the_same_call_twice_is_bitwise_equal(backend):
    case = case_for(backend, packed=True, width=3)
    once, twice = interpreted(case, backend), interpreted(case, backend)
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_padding_leaves_the_state_untouched(backend):
    """Rows that end in the middle of a block, at its border, and before they begin, run from their
    end: the state goes through the padding first."""
    case = case_for(backend, batch=3, width=3, reverse=True)
    ids = np.zeros((3, LENGTH), np.int32)
    ids[0, :21], ids[1, :16] = 1, 1
    case.ids = jax.numpy.asarray(ids)
    result = interpreted(case, backend)
    testing.assert_close(result, case.oracle(), testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(result["outputs"][1][2], case.args[3][2])


@pytest.mark.full
def test_one_chunk_on_a_gpu_that_the_batch_fills():
    case, tiles = case_for("gpu", packed=True, width=3), gpu.Tiles(64, 16, 4)
    testing.assert_close(interpreted(case, "gpu", tiles), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize(
    ("backend", "tiles"), [("tpu", tpu.Tiles(128)), ("gpu", gpu.Tiles(128, 16, 4))]
)
def test_slow_decays_do_not_drift(backend, tiles):
    """A million steps of memory; the correction of rounded decays is what keeps this exact."""
    case = case_for(backend, length=128, batch=1, width=2, states=2, decay=(1e-6, 1e-5))
    testing.assert_close(
        interpreted(case, backend, tiles), case.oracle(), testing.FLOAT32_TOLERANCE
    )


def broken_carry_not_reset(monkeypatch):
    monkeypatch.setattr(tpu, "sequence_begins", lambda: tpu.pl.program_id(0) < 0)


def broken_carry_shifted_by_one(monkeypatch):
    """Each block's state goes on without the last step of its last group."""
    step = tpu._Group.step
    last = tpu.SUBLANES - 1
    monkeypatch.setattr(tpu._Group, "step", lambda self, j: step(self, j - 1 if j == last else j))


@pytest.mark.always("broken_carry_not_reset")
@pytest.mark.parametrize("mutant", [broken_carry_not_reset, broken_carry_shifted_by_one])
def test_mutants_are_caught(mutant, monkeypatch):
    case = case_for("tpu", width=3)
    expected = case.oracle()
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(interpreted(case, "tpu"), expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("length", [1, 15, 1000, 2048, 2056, 16384])
@pytest.mark.parametrize("states", [8, 32, 256, 512])
def test_tpu_tiles_obey_the_estimate(length, states):
    assert tpu.refusal(states) is None
    tiles = tpu.choose_tiles(length, states)
    assert tiles.steps % 16 == 0
    assert tiles.steps < length + 16
    for kernel in ("forward", "adjoint", "gradient"):
        # Half of the 16 MiB that a kernel may take on v5e without asking for more.
        assert tpu.vmem_bytes(tiles, states, kernel=kernel) <= 2**23
    if length % 128 == 0 and states <= 32:
        assert length % tiles.steps == 0


def test_a_model_too_wide_for_a_kernel_is_refused():
    assert "bytes of VMEM" in (tpu.refusal(4096) or "")
    assert "registers" in (gpu.refusal(4096) or "")


def test_vmem_of_a_known_tile():
    """u, y and codes, 64 steps of 128 lanes; ten planes of 32 states; everything twice."""
    actual = tpu.vmem_bytes(tpu.Tiles(64), 32, kernel="forward")
    assert actual == 2 * (3 * 64 * 128 * 4 + 10 * 32 * 128 * 4)


@pytest.mark.parametrize(
    ("batch", "length", "width", "states", "expected"),
    [
        (50, 2048, 128, 32, (512, 16, 4)),
        (1, 65536, 64, 2, (64, 32, 4)),
        (4096, 2048, 128, 64, (2048, 8, 4)),
        (2, 3, 5, 5, (3, 8, 4)),
    ],
)
def test_gpu_tiles(batch, length, width, states, expected):
    assert gpu.choose_tiles(batch, length, width, states) == expected
