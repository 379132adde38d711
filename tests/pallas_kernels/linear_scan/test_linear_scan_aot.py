"""The linear scan compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.linear_scan.shapes import case, named
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import (
    assert_spills_nothing,
    for_spills,
    needs_compiler,
    on_gpus,
    on_tpus,
)

CASE = "pallas_kernels.linear_scan.shapes:case"
# A decay for each step, and a constant one.
REPRESENTATIVES = ["recurrentgemma-2b-packed", "s5-listops"]
SPILL_SHAPES = ["recurrentgemma-2b-packed", "s5-text"]


@pytest.mark.parametrize(("chip", "shape"), on_tpus(REPRESENTATIVES))
def test_compiles_for_tpu(chip, shape):
    compiled = aot.compile_for(chip, *case(shape, "tpu", "forward+backward"))
    assert (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(("chip", "shape"), on_gpus(REPRESENTATIVES))
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    assert "linear_scan_forward" in text
    assert "linear_scan_backward" in text


@pytest.mark.parametrize(("chip", "shapes"), for_spills(["a100"], SPILL_SHAPES))
def test_forward_spills_no_registers(chip, shapes):
    assert_spills_nothing(chip, CASE, shapes, "linear_scan_forward")


def test_forward_moves_three_arrays_and_backward_five():
    shape = named("recurrentgemma-2b")
    fn, *operands = case(shape, "tpu", "forward")
    array, row = shape.length * shape.width * 4, shape.width * 4
    assert aot.kernel_bytes(fn, *operands) == 3 * array + 2 * row
    fn, *operands = case(shape, "tpu", "forward+backward")
    moved = aot.kernel_bytes(fn, *operands)
    assert moved is not None
    # The rest: states, and the 8 rows of h before each block.
    assert 8 * array < moved < 8.05 * array


@pytest.mark.full
def test_forward_on_a_tpu_is_at_the_floor_without_layout_copies():
    cost = aot.estimate("v5e", CASE, "recurrentgemma-2b", "tpu", "forward", "0.25")
    assert cost.times_floor < 1.05
    assert cost.layout_copies == {}


@pytest.mark.full
def test_forward_and_backward_on_a_tpu_move_eight_arrays_where_six_is_the_floor():
    cost = aot.estimate("v5e", CASE, "recurrentgemma-2b", "tpu", "forward+backward", "0.25")
    assert cost.times_floor < 1.4
    assert cost.layout_copies == {}


def test_scaled_shape_keeps_all_but_the_length():
    shape = named("s5-text").scaled(0.5)
    assert (shape.batch, shape.length, shape.width) == (50, 2048, 96)
    assert shape.constant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("gpt", "tpu"), "shape='gpt'"), (("odd", "tpu", "sideways"), "mode='sideways'")],
)
def test_unknown_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        case(*arguments)
