"""Products of bfloat16 arrays: the same program on accelerators, one that runs on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import products
from tests import tolerances

EQUATION = "blhi,hij->blhj"  # refused by XLA's CPU backend where L or B is above 1


@pytest.fixture(scope="module")
def arrays():
    x, y = jax.random.normal(jax.random.key(0), (2, 5, 3, 4)), jnp.ones((3, 4, 4)) / 3
    return x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)


def gradients(x, y):
    return jax.grad(lambda x, y: jnp.sin(products.einsum(EQUATION, x, y)).sum(), (0, 1))(x, y)


def test_value_and_gradients_on_a_cpu(arrays):
    wide = [x.astype(jnp.float32) for x in arrays]
    expected = jnp.einsum(EQUATION, *wide, precision="highest")
    for run in (jax.jit(products.einsum, static_argnums=0), products.einsum):
        found = run(EQUATION, *arrays)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, **tolerances.EACH_FLOAT32_NEAR_ONE)
    for found, wanted in zip(jax.jit(gradients)(*arrays), gradients(*wide), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, **tolerances.EACH_BFLOAT16)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_multiply_bfloat16(arrays, platform):
    run = jax.jit(lambda x, y: products.einsum(EQUATION, x, y))
    text = run.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    (line,) = [line for line in text.splitlines() if "dot_general" in line]
    assert line.split(" : ")[1].count("bf16>") == 2
    assert "-> tensor<3x4x2x5xf32>" in line


def test_a_backward_pass_keeps_the_arrays_and_no_copies(arrays):
    _, kept = jax.eval_shape(lambda x, y: jax.vjp(lambda *a: products.einsum(EQUATION, *a), x, y),
                             *arrays)  # fmt: skip
    sizes = sorted(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert sizes == sorted(x.size * 2 for x in arrays)


def test_no_choice_of_platforms_where_nothing_is_narrow(arrays):
    wide = [x.astype(jnp.float32) for x in arrays]
    assert "platform_index" not in str(jax.make_jaxpr(products.einsum, static_argnums=0)(
        EQUATION, *wide
    ))  # fmt: skip
