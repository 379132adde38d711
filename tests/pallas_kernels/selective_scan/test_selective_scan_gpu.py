"""The GPU kernels, interpreted on the host."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.selective_scan import gpu
from pallas_kernels.tools import testing
from tests.pallas_kernels.selective_scan.cases import Case, assert_isolated

# Small tiles: 3 spans of 3 groups and 2 strips of channels; neither length nor width divides.
LENGTH, WIDTH, TILES = 17, 5, gpu.Tiles(6, 4, 2)


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def interpreted(case, tiles=TILES, **options):
    with testing.interpret():
        return jax.tree.map(np.asarray, case.run("gpu", tiles=tiles, **options))


# Each feature with most others, not the full product: interpretation is slow.
FEATURES = [
    {"states": 3},
    pytest.param({"full": False, "reverse": True}, marks=pytest.mark.full),
    pytest.param({"packed": True, "full": False}, marks=pytest.mark.full),
    {"packed": True, "reverse": True, "states": 3},
    {"dtype": "bfloat16"},
]


@pytest.mark.always("True-True-3")
@pytest.mark.parametrize("features", FEATURES, ids=lambda f: "-".join(map(str, f.values())))
def test_kernels_equal_the_oracle(features):
    case = Case(**({"length": LENGTH, "width": WIDTH} | features))
    narrow = features.get("dtype") == "bfloat16"
    tolerance = testing.BFLOAT16_TOLERANCE if narrow else testing.FLOAT32_TOLERANCE
    testing.assert_close(interpreted(case), case.oracle(), tolerance)


@pytest.mark.full
def test_one_span_where_the_batch_fills_the_gpu():
    case = Case(length=LENGTH, width=WIDTH, packed=True)
    testing.assert_close(
        interpreted(case, gpu.Tiles(18, 4, 2)), case.oracle(), testing.FLOAT32_TOLERANCE
    )


@pytest.mark.always("True")
@pytest.mark.parametrize("reverse", [False, True])
def test_documents_are_isolated_to_the_bit(reverse):
    case = Case(length=LENGTH, width=3, reverse=reverse)
    assert_isolated(functools.partial(interpreted, case), case)


def broken_boundary(monkeypatch):
    """The state kept for the backward pass is the one after the group."""
    original = gpu._group

    def shifted(dims, tile, index, *, backward=False):
        place, times = original(dims, tile, index, backward=backward)
        return (place + 1 if backward else place), times

    monkeypatch.setattr(gpu, "_group", shifted)


def broken_chain(monkeypatch):
    """Every span begins with what enters the row."""
    chain = gpu._chain_kernel

    def unchained(*refs, dims, names, backward):
        refs = dict(zip(names, refs, strict=True))
        chain(
            *(refs | {"flow": refs["product"]}).values(), dims=dims, names=names, backward=backward
        )

    monkeypatch.setattr(gpu, "_chain_kernel", unchained)


@pytest.mark.always("broken_chain")
@pytest.mark.parametrize("mutant", [broken_boundary, broken_chain])
def test_mutants_are_caught(mutant, monkeypatch):
    case = Case(length=LENGTH, width=WIDTH, full=False)
    expected = case.oracle()
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(interpreted(case), expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("length", [1, 100, 2048, 65536])
@pytest.mark.parametrize("states", [1, 16, 100])
def test_tiles_cover_the_row_and_hold_few_registers(batch, length, states):
    tiles = gpu.choose_tiles(batch, length, 1536, states)
    spans = -(-length // tiles.span)
    assert tiles.span % tiles.group == 0
    assert (spans - 1) * tiles.span < length
    # States before each step of a group, in 32-bit registers of 32 threads.
    padded = 2 ** (states - 1).bit_length()
    assert tiles.group * tiles.width * padded / 32 <= 64
