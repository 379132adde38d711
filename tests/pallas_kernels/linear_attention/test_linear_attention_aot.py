"""Linear attention compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.linear_attention.shapes import SHAPES, case
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import (
    TPUS,
    assert_forward_spills_nothing,
    both_modes,
    needs_compiler,
)

CASE = "pallas_kernels.linear_attention.shapes:case"
SPILL_SHAPES = ["head-bench-packed", "key-bench-packed", "gla-1.3b", "plain", "odd-key-packed"]


@pytest.mark.parametrize(("chip", "shape", "mode"), both_modes(TPUS, SHAPES))
def test_compiles_for_tpu(chip, shape, mode):
    compiled = aot.compile_for(chip, *case(shape, "tpu", mode))
    kernels = {"forward": 1, "forward+backward": 2}[mode]
    assert (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == kernels


@pytest.mark.parametrize(
    ("chip", "shape"),
    [("a100", "head-bench-packed"), ("h100", "key-bench"), ("b200", "retnet-1.3b")],
)
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    for kernel in ("chunk_fwd_h", "chunk_fwd_o", "chunk_bwd_dv", "chunk_bwd_dqkg"):
        assert f"linear_attention_{kernel}" in text


@pytest.mark.parametrize("chip", ["a100", "h100"])
def test_forward_spills_no_registers(chip):
    assert_forward_spills_nothing(chip, CASE, SPILL_SHAPES, "linear_attention_chunk_fwd")
