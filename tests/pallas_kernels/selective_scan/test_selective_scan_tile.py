"""The maths that the kernels share, on plain values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import tile
from tests import tolerances

X = jnp.asarray([-200.0, -30.0, -7.0, -1.0, -1e-3, 0.0, 0.5, 3.0, 30.0, 200.0])


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_sigmoid_and_silu_equal_jax():
    np.testing.assert_allclose(tile.sigmoid(X), jax.nn.sigmoid(X), **tolerances.EACH_FLOAT32_TERMS)
    np.testing.assert_allclose(tile.silu(X), jax.nn.silu(X), **tolerances.EACH_FLOAT32_TERMS)


def test_slopes_equal_autodiff():
    slope = jax.vmap(jax.grad(jax.nn.silu))(X)
    np.testing.assert_allclose(tile.silu_gradient(X), slope, **tolerances.EACH_FLOAT32_SMALL_TERMS)
    bias = jnp.full_like(X, 0.25)
    slope = jax.vmap(jax.grad(lambda x: jax.nn.softplus(x + 0.25)))(X)
    ours = tile.step_size_gradient(X, bias, jnp.ones_like(X), softplus=True)
    np.testing.assert_allclose(ours, slope, **tolerances.EACH_FLOAT32_SUM)


@pytest.mark.parametrize("bias", [None, 0.25])
def test_step_size_is_exact_where_softplus_is_small(bias):
    exact = np.logaddexp(0.0, np.asarray(X, np.float64) + (bias or 0.0))
    ours = tile.step_size(X, None if bias is None else jnp.full_like(X, bias), softplus=True)
    # Subnormal results flush to zero.
    np.testing.assert_allclose(ours, exact, **tolerances.EACH_FLOAT32_NORMAL)
    assert tile.step_size(X, None, softplus=False) is X


def test_decay_at_extremes():
    dt = jnp.asarray([0.0, 1e-3, 100.0])
    A_log2 = jnp.asarray([-1e4, -1.0, -1e4]) * tile.LOG2_E
    np.testing.assert_allclose(
        tile.decay(dt, A_log2), [1.0, np.exp(-1e-3), 0.0], **tolerances.EACH_FLOAT32_TERMS
    )


def test_a_document_that_overflowed_does_not_reach_the_next():
    h, decay, flow = (jnp.asarray([x]) for x in (jnp.inf, 0.5, 3.0))
    assert tile.advance(h, decay, flow, jnp.asarray([False]))[0] == 3.0
    c_before, P = tile.retreat(jnp.asarray([2.0]), decay, h, jnp.asarray([False]))
    assert (c_before[0], P[0]) == (0.0, 0.0)


def test_retreat_is_the_derivative_of_advance():
    h, G = jnp.asarray([0.7, -2.0]), jnp.asarray([1.5, 0.3])
    dt, A = jnp.asarray([0.1, 0.4]), jnp.asarray([-1.0, -3.0])

    def step(h, dt):
        return tile.advance(h, tile.decay(dt, A * tile.LOG2_E), jnp.zeros_like(h))

    _, pullback = jax.vjp(step, h, dt)
    dh, ddt = pullback(G)
    c_before, P = tile.retreat(G, tile.decay(dt, A * tile.LOG2_E), h)
    np.testing.assert_allclose(c_before, dh, **tolerances.EACH_FLOAT32_TERMS)
    np.testing.assert_allclose(P * A, ddt, **tolerances.EACH_FLOAT32_TERMS)
