"""Checkpoint attention compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.checkpoint_attention.shapes import SHAPES, case
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import (
    GPUS,
    assert_spills_nothing,
    for_spills,
    needs_compiler,
    on_gpus,
    on_tpus,
)

CASE = "pallas_kernels.checkpoint_attention.shapes:case"
# Whether it compiles depends on widths and ranges, hardly on lengths.
REPRESENTATIVES, REPRESENTATIVES_ON_GPUS = ["rat-1.3b"], ["bench-packed", "rat-1.3b"]
SPILL_SHAPES = ["bench-packed", "bench"]


@pytest.mark.parametrize(("chip", "shape"), on_tpus(REPRESENTATIVES))
def test_compiles_for_tpu(chip, shape):
    text = aot.compile_for(chip, *case(shape, "tpu", "forward+backward")).as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(("chip", "shape"), on_gpus(REPRESENTATIVES_ON_GPUS))
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    for kernel in ("forward", "backward", "backward_slots"):
        assert f"checkpoint_attention_{kernel}" in text


@pytest.mark.parametrize(("chip", "shapes"), for_spills(GPUS, SPILL_SHAPES))
def test_forward_spills_no_registers(chip, shapes):
    assert_spills_nothing(chip, CASE, shapes, "checkpoint_attention_forward")


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
