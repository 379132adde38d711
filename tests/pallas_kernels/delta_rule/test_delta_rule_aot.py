"""The delta rule compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.delta_rule.shapes import case
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import (
    GPUS,
    assert_spills_nothing,
    for_spills,
    needs_compiler,
    on_gpus,
    on_tpus,
)

CASE = "pallas_kernels.delta_rule.shapes:case"
# Those of real models, and with decays, take longer: they are in the table.
REPRESENTATIVES = ["odd-plain"]
REPRESENTATIVES_ON_GPUS = ["odd-plain"]
SPILL_SHAPES = ["kda-bench-packed", "gated-delta-bench", "deltanet-1.3b"]


@pytest.mark.parametrize(("chip", "shape"), on_tpus(REPRESENTATIVES))
def test_compiles_for_tpu(chip, shape):
    """The forward kernel, which keeps states where there is a backward one."""
    compiled = aot.compile_for(chip, *case(shape, "tpu", "forward+backward"))
    assert (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"') == 2


KERNELS = (
    "chunk_scaled_dot_kkt",
    "solve_tril",
    "chunk_fwd_h",
    "chunk_fwd_o",
    "chunk_bwd_dhu",
    "prepare_wy_repr_bwd",
    "chunk_bwd_dqkwg",
)


@pytest.mark.parametrize(("chip", "shape"), on_gpus(REPRESENTATIVES_ON_GPUS))
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    for kernel in KERNELS:
        assert f"delta_rule_{kernel}" in text


@pytest.mark.parametrize(("chip", "shapes"), for_spills(GPUS, SPILL_SHAPES))
def test_forward_spills_no_registers(chip, shapes):
    assert_spills_nothing(chip, CASE, shapes, "delta_rule_chunk_fwd_h")
