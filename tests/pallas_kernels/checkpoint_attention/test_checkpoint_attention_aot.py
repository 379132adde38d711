"""Checkpoint attention compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.checkpoint_attention.shapes import SHAPES, case
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import TPUS, alternating, needs_compiler

CASE = "pallas_kernels.checkpoint_attention.shapes:case"


@pytest.mark.parametrize(("chip", "shape"), alternating(TPUS, SHAPES))
def test_compiles_for_tpu(chip, shape):
    text = aot.compile_for(chip, *case(shape, "tpu", "forward+backward")).as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 2


# One of each kind: whether it compiles depends on widths and ranges, hardly on lengths.
GPU_SHAPES = [("a100", "bench"), ("h100", "scout-430m"), ("h200", "odd-packed"), ("b200", "long")]


@pytest.mark.parametrize(("chip", "shape"), GPU_SHAPES)
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    for kernel in ("forward", "backward", "backward_slots"):
        assert f"checkpoint_attention_{kernel}" in text


@pytest.mark.parametrize(("chip", "shape"), [("a100", "bench-packed"), ("h100", "bench")])
def test_forward_spills_no_registers(chip, shape):
    needs_compiler(chip)
    kernels = aot.report(chip, CASE, shape, "gpu", "forward")
    assert any("checkpoint_attention_forward" in kernel.name for kernel in kernels)
    assert {kernel.name: kernel.spill_stores for kernel in kernels if kernel.spill_stores} == {}


def test_scaled_shape_keeps_all_but_the_length():
    shape = SHAPES["bench"].scaled(0.5)
    assert (shape.length, shape.heads, shape.key_size, shape.interval) == (4096, 16, 128, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("gpt", "tpu"), "shape='gpt'"), (("odd", "tpu", "sideways"), "mode='sideways'")],
)
def test_unknown_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        case(*arguments)
