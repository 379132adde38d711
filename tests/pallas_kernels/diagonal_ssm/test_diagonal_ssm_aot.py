"""The model compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.diagonal_ssm.shapes import case, named
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import (
    assert_spills_nothing,
    for_spills,
    needs_compiler,
    on_gpus,
    on_tpus,
)

CASE = "pallas_kernels.diagonal_ssm.shapes:case"
# Whether it compiles depends on the number of states, hardly on lengths.
REPRESENTATIVES, REPRESENTATIVES_ON_GPUS = ["s4d-text-packed"], ["short"]
SPILL_SHAPES = ["s4d-text-packed", "dss-listops"]


@pytest.mark.parametrize(("chip", "shape"), on_tpus(REPRESENTATIVES))
def test_compiles_for_tpu(chip, shape):
    compiled = aot.compile_for(chip, *case(shape, "tpu", "forward+backward"))
    assert (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize(("chip", "shape"), on_gpus(REPRESENTATIVES_ON_GPUS))
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    for kernel in ("forward", "adjoint", "gradient"):
        assert f"diagonal_ssm_{kernel}" in text


@pytest.mark.parametrize(("chip", "shapes"), for_spills(["a100"], SPILL_SHAPES))
def test_forward_spills_no_registers(chip, shapes):
    assert_spills_nothing(chip, CASE, shapes, "diagonal_ssm_forward")


def test_no_kernel_moves_the_states_of_all_tokens():
    shape = named("s4d-text")
    rows = shape.batch * shape.length * shape.width * 4
    fn, *operands = case(shape, "tpu", "forward")
    moved = aot.kernel_bytes(fn, *operands)
    assert moved is not None
    # The rest: parameters and states, which go once for each row of the batch.
    assert 2 * rows < moved < 2.2 * rows
    fn, *operands = case(shape, "tpu", "forward+backward")
    moved = aot.kernel_bytes(fn, *operands)
    assert moved is not None
    assert 6 * rows < moved < 6.6 * rows


def test_scaled_shape_keeps_all_but_the_length():
    shape = named("s4d-text").scaled(0.5)
    assert (shape.batch, shape.length, shape.width, shape.states) == (16, 2048, 256, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("gpt", "tpu"), "shape='gpt'"), (("short", "tpu", "sideways"), "mode='sideways'")],
)
def test_unknown_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        case(*arguments)
