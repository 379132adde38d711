"""`jax.export` with a symbolic batch, for each platform."""

import jax
import numpy as np
import pytest
from jax import export

from pallas_kernels import explain, linear_scan
from pallas_kernels.tools import operands, testing
from tests.pallas_kernels.export_checks import DISABLED_CHECKS, symbols_as_sizes
from tests.tiers import one_of_many


@pytest.fixture(autouse=True)
def _symbols_as_sizes():
    with symbols_as_sizes():
        yield


def symbolic(name):
    (batch,) = export.symbolic_shape("b")
    return {
        operand: jax.ShapeDtypeStruct(*spec)
        for operand, spec in operands.shapes(name, batch).items()
    }


@pytest.mark.full("linear_attention")
@pytest.mark.parametrize("name", one_of_many(operands.OPS, ["linear_scan", "linear_attention"]))
def test_a_symbolic_batch_runs_for_any(name):
    run = jax.jit(operands.call(name))
    exported = export.export(run, platforms=["cpu"])(symbolic(name))
    for batch in (1, 3):
        args = operands.arrays(name, batch)
        testing.assert_close(exported.call(args), run(args), testing.FLOAT32_TOLERANCE)
    for platform in ("tpu", "cuda"):
        lowered = export.export(run, platforms=[platform], disabled_checks=DISABLED_CHECKS)
        lowered(symbolic(name))


def test_gradients_for_a_symbolic_batch():
    run = operands.call("selective_scan", "xla")
    gradients = jax.jit(jax.grad(lambda args: run(args)[0].sum()))
    exported = export.export(gradients, platforms=["cpu"])(symbolic("selective_scan"))
    args = operands.arrays("selective_scan", 3)
    testing.assert_close(exported.call(args), gradients(args), testing.FLOAT32_TOLERANCE)


def test_a_triton_kernel_says_why_it_does_not_serve_a_symbolic_batch():
    choices = explain(linear_scan, **symbolic("linear_scan"))
    chosen = {c.platform: c for c in choices if c.op == "linear_scan"}
    assert (chosen["tpu"].implementation, chosen["cuda"].implementation) == ("tpu", "xla")
    assert "known when it is traced, the batch is b" in chosen["cuda"].skipped["gpu"]


@pytest.mark.parametrize("name", ["linear_scan", "long_conv"])
def test_one_export_for_several_platforms_takes_the_portable_path(name):
    run = jax.jit(operands.call(name, "xla"))
    exported = export.export(run, platforms=["cpu", "tpu", "cuda"])(symbolic(name))
    args = operands.arrays(name, 2)
    testing.assert_close(exported.call(args), run(args), testing.FLOAT32_TOLERANCE)
    assert np.array_equal(exported.platforms, ["cpu", "tpu", "cuda"])
