"""Compiling for absent chips: what is read from the compilers, and how errors reach the caller."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common.compat import pallas_call, pl, tpu
from pallas_kernels.tools import aot, hlo
from tests.pallas_kernels.absent import needs_compiler

HERE = "tests.pallas_kernels.tools.test_aot"
VECTOR = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
MIB4 = 4 * 2**20

PROGRAM = """\
HloModule jit_f

%fused (p.1: f32[8,128]) -> f32[128,8] {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %transpose.2 = f32[128,8]{1,0:T(8,128)} transpose(%p.1), dimensions={1,0}
}

ENTRY %main (a.1: f32[8,128], b.1: bf16[8,128]) -> (f32[128,8], f32[8,128]) {
  %a.1 = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="a"}
  %b.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %k.1 = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}) custom-call(%a.1, %b.1, %a.1), \
custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8,128]{1,0}}
  %kept = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%k.1), index=0
  %turned = f32[8,128]{0,1:T(8,128)} copy(%a.1)
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a.1)
  %done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %out = f32[8,128]{1,0:T(8,128)} copy(%kept)
  %fusion.1 = f32[128,8]{1,0:T(8,128)} fusion(%a.1), kind=kLoop, calls=%fused
  ROOT %tuple.1 = (f32[128,8], f32[8,128]) tuple(%fusion.1, %out)
}
"""


def double(size: str):
    """A case for the subprocess: reads and writes `size x size` float32 once."""
    n = int(size)
    return (lambda x: 2 * x + 1), jax.ShapeDtypeStruct((n, n), jnp.float32)


def looping():
    def fn(x):
        return jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros(1024), x)

    return fn, VECTOR


def failing():
    raise RuntimeError("this case has no shapes")


def test_traffic_counts_each_array_of_an_op_once_and_nothing_in_vmem():
    program = hlo.parse(PROGRAM)
    f32, bf16 = 4096, 2048
    kernel = f32 + bf16 + f32  # a once although it is passed twice; one result stays in VMEM
    turned, prefetch, out, fusion = 2 * f32, f32, f32, 2 * f32
    assert program.traffic() == kernel + turned + prefetch + out + fusion
    assert program.kernels() == 1


def test_a_slice_reads_what_it_returns():
    text = """
ENTRY %main (x: f32[4096,128]) -> f32[4,128] {
  %x = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %last = f32[4,128]{1,0:T(4,128)S(1)} slice(%x), slice={[4092:4096], [0:128]}
  ROOT %out = f32[4,128]{1,0:T(4,128)} copy(%last)
}
"""
    assert hlo.parse(text).traffic() == 2 * 4 * 128 * 4


def test_layout_copies_are_transposes_and_copies_that_change_the_layout():
    assert hlo.parse(PROGRAM).layout_copies() == {"turned": 4096, "fusion.1": 4096}


def test_traffic_of_a_program_with_a_loop_is_refused():
    text = PROGRAM.replace("f32[8,128]{0,1:T(8,128)} copy(", "f32[8,128]{0,1} while(")
    with pytest.raises(ValueError, match=r"while \(turned\).*lax\.scan"):
        hlo.parse(text).traffic()


def _blocked(index_map, *, block=(256, 384)):
    """A kernel over (1000, 1024) in 4 x 3 blocks that reads by `index_map` and writes plainly."""

    def call(x):
        return pallas_call(
            lambda x_ref, o_ref: o_ref.__setitem__(..., x_ref[...]),
            backend="tpu",
            name="blocked",
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(4, 3),
            in_specs=[pl.BlockSpec(block_shape=block, index_map=index_map)],
            out_specs=pl.BlockSpec(block_shape=block, index_map=lambda i, j: (i, j)),
            compiler_params=tpu.CompilerParams(),
            flops=0,
        )(x)

    return call, jax.ShapeDtypeStruct((1000, 1024), jnp.float32)


@pytest.mark.parametrize(
    ("index_map", "read"),
    [
        (lambda i, j: (i, j), 1000 * 1024),  # every block once, only what lies inside the array
        (lambda i, j: (j, 0), 4 * 768 * 384),  # blocks 0, 1, 2 for every i
        (lambda i, j: (i, 0), 1000 * 384),  # the same block over j is fetched once
        (lambda i, j: (0, 0), 256 * 384),
    ],
)
def test_kernel_bytes_count_blocks_times_changes_of_their_index(index_map, read):
    assert aot.kernel_bytes(*_blocked(index_map)) == 4 * (read + 1000 * 1024)


def test_kernel_bytes_look_into_branches_and_custom_derivatives():
    fn, x = _blocked(lambda i, j: (i, j))
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda x: (fn(x), None), lambda _, g: (g,))

    def program(x):
        return jax.lax.platform_dependent(x, tpu=jax.jit(wrapped), default=lambda x: x)

    assert aot.kernel_bytes(program, x) == 2 * 4 * 1000 * 1024
    assert aot.kernel_bytes(lambda x: 2 * x, x) == 0


def _argument_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.argument_size_in_bytes


@pytest.mark.parametrize("chip", aot.TPUS)
def test_every_tpu_compiles_and_leaves_the_environment_alone(chip):
    before = dict(os.environ)
    assert _argument_bytes(aot.compile_for(chip, lambda x: 2 * x, VECTOR)) == MIB4
    assert os.environ == before


@pytest.mark.parametrize("chip", aot.GPUS)
def test_every_gpu_compiles(chip):
    needs_compiler(chip)
    assert _argument_bytes(aot.compile_for(chip, lambda x: 2 * x, VECTOR)) == MIB4


def test_topology_of_many_chips():
    assert len(aot.topology("v5e", "4x4").devices) == 16


def test_estimate_of_a_streaming_program():
    cost = aot.estimate("v5e", f"{HERE}:double", "2048")
    assert cost.floor_bytes == cost.traffic_bytes == 2 * 4 * 2048**2
    assert cost.floor_us == pytest.approx(cost.floor_bytes / 819e3)
    assert cost.times_floor == pytest.approx(cost.us / cost.floor_us)
    assert cost.us >= cost.static_us > 0
    assert cost.cycles >= sum(cost.ops.values()) > 0
    assert (cost.kernels, cost.kernel_bytes, cost.layout_copies) == (0, 0, {})


def test_estimate_refuses_a_loop_outside_a_kernel():
    with pytest.raises(ValueError, match="HLO while"):
        aot.estimate("v5e", f"{HERE}:looping")


def test_report_of_gpu_kernels():
    needs_compiler("h100")
    (kernel,) = aot.report("h100", f"{HERE}:double", "2048")
    assert 0 < kernel.registers <= 255
    assert kernel.spill_stores == kernel.spill_loads == 0


@pytest.mark.full
def test_each_answers_in_order_and_goes_on_after_a_failure():
    costs = list(aot.each("v5e", f"{HERE}:double", [["2048"], ["many"], ["1024"]]))
    assert costs[0] == aot.estimate("v5e", f"{HERE}:double", "2048")
    assert isinstance(costs[1], RuntimeError)
    assert "invalid literal for int" in str(costs[1])
    assert costs[2].floor_bytes == costs[0].floor_bytes / 4


def dying():
    os._exit(3)


def test_each_goes_on_after_a_process_has_died():
    errors = list(aot.each("v5e", f"{HERE}:dying", [[], []]))
    assert ["ended its process" in str(error) for error in errors] == [True, True]


def test_a_failing_case_brings_its_own_message():
    with pytest.raises(RuntimeError, match="this case has no shapes"):
        aot.estimate("v5e", f"{HERE}:failing")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aot.compile_for("v3", abs, VECTOR), "chip='v3' is unknown; one of v5e"),
        (lambda: aot.estimate("h100", f"{HERE}:double"), "static costs are for v5e"),
        (lambda: aot.report("v5e", f"{HERE}:double"), "kernel reports are for a100"),
        (lambda: aot.estimate("v5e", "double"), "case='double' must be"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("chip", "name"), [("v6e", "libtpu"), ("h100", "jax_cuda13_plugin")])
def test_a_compiler_that_is_not_installed_is_named_with_its_extra(monkeypatch, chip, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"{name}.*pip install 'seqmodels\[aot\]'"):
        aot.compile_for(chip, abs, VECTOR)


@pytest.mark.full
def test_help_shows_an_example():
    command = [sys.executable, "-m", "pallas_kernels.tools.aot", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "recurrentgemma-2b tpu forward" in text
    assert "--dump" not in text
