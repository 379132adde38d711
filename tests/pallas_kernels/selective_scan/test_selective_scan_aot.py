"""The selective scan compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.selective_scan.shapes import SHAPES, case
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import (
    assert_spills_nothing,
    for_spills,
    needs_compiler,
    on_gpus,
    on_tpus,
)

CASE = "pallas_kernels.selective_scan.shapes:case"
# Whether it compiles depends on the flags and on N, hardly on lengths.
REPRESENTATIVES, REPRESENTATIVES_ON_GPUS = ["odd-packed-reverse"], ["bench"]
SPILL_SHAPES = ["bench", "mamba-790m-packed"]


@pytest.mark.parametrize(("chip", "shape"), on_tpus(REPRESENTATIVES))
def test_compiles_for_tpu(chip, shape):
    text = aot.compile_for(chip, *case(shape, "tpu", "forward+backward")).as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(("chip", "shape"), on_gpus(REPRESENTATIVES_ON_GPUS))
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    assert "selective_scan_forward" in text
    assert "selective_scan_backward" in text


@pytest.mark.parametrize(("chip", "shapes"), for_spills(["a100"], SPILL_SHAPES))
def test_forward_spills_no_registers(chip, shapes):
    assert_spills_nothing(chip, CASE, shapes, "selective_scan_forward")


@pytest.mark.full
def test_forward_is_within_twice_the_floor():
    cost = aot.estimate("v5e", CASE, "bench", "tpu", "forward", "0.5")
    assert cost.times_floor < 2.0
    assert sum(cost.layout_copies.values()) < 0.01 * cost.floor_bytes


def test_scaled_shape_keeps_all_but_the_length():
    shape = SHAPES["mamba-130m"].scaled(0.5)
    assert (shape.batch, shape.length, shape.width, shape.states) == (1, 1024, 1536, 16)
    assert shape.gated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("gpt", "tpu"), "shape='gpt'"), (("odd", "tpu", "sideways"), "mode='sideways'")],
)
def test_unknown_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        case(*arguments)
