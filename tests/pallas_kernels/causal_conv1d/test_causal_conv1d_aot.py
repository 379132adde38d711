"""The convolution compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.causal_conv1d.shapes import case, named
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import (
    assert_spills_nothing,
    for_spills,
    needs_compiler,
    on_gpus,
    on_tpus,
)

CASE = "pallas_kernels.causal_conv1d.shapes:case"
# Whether it compiles depends on taps, dtype and flags, hardly on lengths.
REPRESENTATIVES = ["mamba-2.8b-packed"]
SPILL_SHAPES = ["mamba-2.8b-packed", "odd-packed"]


@pytest.mark.parametrize(("chip", "shape"), on_tpus(REPRESENTATIVES))
def test_compiles_for_tpu(chip, shape):
    # The forward kernel of this program is the one that "forward" alone compiles.
    compiled = aot.compile_for(chip, *case(shape, "tpu", "forward+backward"))
    assert (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(("chip", "shape"), on_gpus(REPRESENTATIVES))
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    assert "causal_conv1d_forward" in text
    assert "causal_conv1d_backward" in text


@pytest.mark.parametrize(("chip", "shapes"), for_spills(["a100"], SPILL_SHAPES))
def test_no_kernel_spills_registers(chip, shapes):
    assert_spills_nothing(chip, CASE, shapes, "causal_conv1d_forward", "forward+backward")


def test_forward_moves_two_arrays_and_backward_three():
    shape = named("mamba-370m-f32")
    fn, *operands = case(shape, "tpu", "forward")
    array = shape.length * shape.width * 4
    moved = aot.kernel_bytes(fn, *operands)
    assert moved is not None
    # The rest: weights, the window, and the 8 rows before each block.
    assert 2 * array < moved < 2.03 * array
    fn, *operands = case(shape, "tpu", "forward+backward")
    moved = aot.kernel_bytes(fn, *operands)
    assert moved is not None
    assert 5 * array < moved < 5.06 * array


@pytest.mark.full
@pytest.mark.parametrize(
    ("shape", "mode", "bound"),
    [
        ("mamba-370m-f32", "forward", 1.05),
        pytest.param("mamba-370m-f32", "forward+backward", 1.3, marks=pytest.mark.full),
        pytest.param("mamba-2.8b", "forward", 1.5, marks=pytest.mark.full),
    ],
)
def test_cost_on_a_tpu(shape, mode, bound):
    cost = aot.estimate("v5e", CASE, shape, "tpu", mode)
    assert cost.times_floor < bound
    # Of the window and its gradient, nothing that grows with the length.
    assert all(copied < 2**17 for copied in cost.layout_copies.values())


def test_scaled_shape_keeps_all_but_the_length():
    shape = named("mamba-2.8b").scaled(0.5)
    assert (shape.batch, shape.length, shape.width) == (2, 1024, 5120)
    assert shape.activation == "silu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("gpt", "tpu"), "shape='gpt'"), (("odd", "tpu", "sideways"), "mode='sideways'")],
)
def test_unknown_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        case(*arguments)
