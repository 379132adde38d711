"""Linear attention compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.linear_attention.shapes import case
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import (
    GPUS,
    assert_spills_nothing,
    for_spills,
    needs_compiler,
    on_gpus,
    on_tpus,
)

CASE = "pallas_kernels.linear_attention.shapes:case"
# No decay, one for each key.
REPRESENTATIVES = ["plain", "key-bench-packed"]
SPILL_SHAPES = ["head-bench-packed", "key-bench-packed", "gla-1.3b", "plain", "odd-key-packed"]


@pytest.mark.parametrize(("chip", "shape"), on_tpus(REPRESENTATIVES))
def test_compiles_for_tpu(chip, shape):
    compiled = aot.compile_for(chip, *case(shape, "tpu", "forward+backward"))
    assert (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(("chip", "shape"), on_gpus(REPRESENTATIVES))
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    for kernel in ("chunk_fwd_h", "chunk_fwd_o", "chunk_bwd_dv", "chunk_bwd_dqkg"):
        assert f"linear_attention_{kernel}" in text


@pytest.mark.full
@pytest.mark.parametrize(("chip", "shapes"), for_spills(GPUS, SPILL_SHAPES, always=True))
def test_forward_spills_no_registers(chip, shapes):
    assert_spills_nothing(chip, CASE, shapes, "linear_attention_chunk_fwd")
