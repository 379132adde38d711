"""HGRN2 against its equations; its lower bounds, its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers import HGRN2Config, build
from seqmodels.mixers.base import ParamLabel
from seqmodels.mixers.hgrn2 import HGRN2_1_3B
from tests import tolerances
from tests.seqmodels.mixers import matrix_oracle, oracles
from tests.seqmodels.mixers.matrix_oracle import heads, output_projection

WIDTH, LENGTH = 4, 9


@pytest.mark.parametrize("layer", [0, 2])
def test_equations(layer):
    config = HGRN2Config(head_size=2, layer=layer, layers=3, init_std=0.5)
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    bound = oracles.sigmoid(p["lower_bound"]) if layer else 0.0
    for x, y in zip(inputs, outputs, strict=True):
        q, f, v = (x @ p[f"{name}_proj/kernel"] for name in "qfi")
        f = bound + (1 - bound) * oracles.sigmoid(f)
        q, f, v = (heads(part, 2) for part in (oracles.silu(q), f, v))
        o = matrix_oracle.attention(q, 1 - f, v, f, 2**-0.5).reshape(LENGTH, -1)
        oracles.assert_close(y, output_projection(o, p))


def test_lower_bounds():
    assert "lower_bound" not in oracles.shapes(HGRN2Config(head_size=2), WIDTH)
    deep = HGRN2Config(head_size=2, layer=3, layers=4)
    start = oracles.fresh(deep, WIDTH)["lower_bound"]
    np.testing.assert_allclose(oracles.sigmoid(start), 0.75, **tolerances.EACH_FLOAT32_TERMS)
    assert deep.param_labels() == {"lower_bound": ParamLabel(weight_decay=False, float32=True)}


def test_saturated_gates_have_finite_gradients():
    config = HGRN2Config(head_size=2, layer=1, layers=2, implementation="reference")
    mixer, x = build(config, WIDTH), jnp.ones((1, 3, WIDTH))
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 100.0), shapes)

    @jax.jit
    @jax.grad
    def gradient(variables, x):
        return jnp.sum(mixer.apply(variables, x)[0])

    for sign in (1.0, -1.0):
        gradients = jax.tree.leaves(gradient(variables, sign * x))
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)


def test_published_size():
    # In the published model the first layer's row of the bounds is not used either.
    assert matrix_oracle.count(HGRN2_1_3B) == 4 * 2048**2 + 2048


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="head_size=3 must divide the width 4"):
        oracles.shapes(HGRN2Config(head_size=3), WIDTH)
