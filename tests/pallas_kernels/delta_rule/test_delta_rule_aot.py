"""The delta rule compiles for absent TPUs and GPUs at the shapes of real models."""

import pytest

from pallas_kernels.delta_rule.shapes import SHAPES, case
from pallas_kernels.tools import aot
from tests.pallas_kernels.absent import (
    TPUS,
    alternating,
    assert_forward_spills_nothing,
    needs_compiler,
)

CASE = "pallas_kernels.delta_rule.shapes:case"


@pytest.mark.parametrize(("chip", "shape"), alternating(TPUS, SHAPES))
def test_compiles_for_tpu(chip, shape):
    """The forward kernel that keeps states, and the backward kernel."""
    compiled = aot.compile_for(chip, *case(shape, "tpu", "forward+backward"))
    assert kernels(compiled) == 2


FORWARD_SHAPES = ["gated-delta-bench-packed", "kda-bench-packed", "odd-plain"]


@pytest.mark.parametrize(("chip", "shape"), alternating(TPUS, FORWARD_SHAPES))
def test_forward_alone_compiles_for_tpu(chip, shape):
    assert kernels(aot.compile_for(chip, *case(shape, "tpu", "forward"))) == 1


def kernels(compiled):
    return (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"')


KERNELS = (
    "chunk_scaled_dot_kkt",
    "solve_tril",
    "chunk_fwd_h",
    "chunk_fwd_o",
    "chunk_bwd_dhu",
    "prepare_wy_repr_bwd",
    "chunk_bwd_dqkwg",
)
# One of each kind: whether it compiles depends on the mode and on widths, hardly on lengths.
GPU_SHAPES = ["gated-delta-bench-packed", "kda-bench-packed", "gated-deltanet-1.3b", "cpu"]
SPILL_SHAPES = ["gated-delta-bench", "kda-bench-packed", "deltanet-1.3b"]


@pytest.mark.parametrize(
    ("chip", "shape"), [*zip(["a100", "h100", "h200", "b200"], GPU_SHAPES, strict=True)]
)
def test_compiles_for_gpu(chip, shape):
    needs_compiler(chip)
    text = aot.compile_for(chip, *case(shape, "gpu", "forward+backward")).as_text() or ""
    for kernel in KERNELS:
        assert f"delta_rule_{kernel}" in text


@pytest.mark.parametrize("chip", ["a100", "h100"])
def test_forward_spills_no_registers(chip):
    assert_forward_spills_nothing(chip, CASE, SPILL_SHAPES, "delta_rule_chunk_fwd_h")
