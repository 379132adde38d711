"""Programs with `jax_enable_x64`: the same dtypes, results and kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels.tools import operands, testing
from tests.pallas_kernels.export_checks import DISABLED_CHECKS
from tests.tiers import one_of_many


def value_and_gradients(name, implementation=None):
    """A jitted function; new at each call, for what is traced under one flag is kept."""
    run = operands.call(name, implementation)

    @jax.jit
    def both(args):
        outputs, pullback = jax.vjp(run, args)
        return outputs, pullback(jax.tree.map(jnp.ones_like, outputs))

    return both


def assert_same(name, implementation=None):
    args = operands.arrays(name, 2)
    expected = jax.device_get(value_and_gradients(name, implementation)(args))
    with jax.enable_x64(True):
        actual = jax.device_get(value_and_gradients(name, implementation)(args))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), actual, expected)
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("name", one_of_many(operands.OPS, ["linear_scan", "linear_attention"]))
def test_an_op_computes_the_same(name):
    assert_same(name, "xla")


@pytest.mark.always("linear_scan-tpu")
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("name", one_of_many(["linear_scan", "causal_conv1d"], ["linear_scan"]))
def test_interpreted_kernels_compute_the_same(name, implementation):
    with testing.interpret():
        assert_same(name, implementation)


@pytest.mark.full("delta_rule")
@pytest.mark.parametrize("name", one_of_many(operands.KERNELS, ["linear_scan", "delta_rule"]))
def test_kernels_lower(name):
    """Traced as they are where nobody forces an implementation: every kernel, for its platform."""
    shapes = {
        operand: jax.ShapeDtypeStruct(*spec) for operand, spec in operands.shapes(name, 2).items()
    }
    with jax.enable_x64(True):
        program = value_and_gradients(name)
        for platform in ("tpu", "cuda"):
            lowered = export.export(program, platforms=[platform], disabled_checks=DISABLED_CHECKS)
            assert "custom_call" in lowered(shapes).mlir_module()
