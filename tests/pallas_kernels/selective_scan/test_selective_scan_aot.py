"""The selective scan compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.selective_scan.shapes import SHAPES, case
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import TPUS, alternating, needs_compiler

CASE = "pallas_kernels.selective_scan.shapes:case"


@pytest.mark.parametrize(("chip", "shape"), alternating(TPUS, SHAPES))
def test_compiles_for_tpu(chip, shape):
    text = aot.compile_for(chip, *case(shape, "tpu", "forward+backward")).as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 2


# One of each kind: whether it compiles depends on the flags and on N, hardly on lengths.
GPU_SHAPES = ["mamba-2.8b", "mamba-790m-packed", "odd-packed-reverse", "bench"]


@pytest.mark.parametrize(
    ("chip", "shape"), [*zip(["a100", "h100", "h200", "b200"], GPU_SHAPES, strict=True)]
)
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    assert "selective_scan_forward" in text
    assert "selective_scan_backward" in text


@pytest.mark.parametrize("shape", ["mamba-790m-packed", "bench"])
def test_forward_spills_no_registers(shape):
    needs_compiler("a100")
    kernels = aot.report("a100", CASE, shape, "gpu", "forward")
    assert any("selective_scan_forward" in kernel.name for kernel in kernels)
    assert {kernel.name: kernel.spill_stores for kernel in kernels if kernel.spill_stores} == {}


def test_forward_is_within_twice_the_floor():
    cost = aot.estimate("v5e", CASE, "bench", "tpu")
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
