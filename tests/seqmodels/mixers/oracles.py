"""What the tests of mixers against token-by-token NumPy share."""

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.mixers import build
from tests import tolerances


def initialised(config, width, length, seed=0):
    """Parameters by path as float64, inputs ``(2, length, width)`` as float64, and outputs.

    Parameters are moved from their initial values, of which some are 0 or all alike.
    """
    mixer = build(config, width)
    rng = np.random.default_rng(seed + 1)
    x = rng.standard_normal((2, length, width)).astype(np.float32)
    variables = jax.jit(mixer.init)(jax.random.key(seed), x)
    variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
        jax.device_get(variables),
    )
    y, _ = jax.jit(mixer.apply)(variables, x)
    return by_path(variables["params"]), np.asarray(x, np.float64), np.asarray(y)


def by_path(params):
    """``{"in_proj/kernel": float64 array}``."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(k.key for k in path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def fresh(config, width, seed=0):
    """The initial parameters by path."""
    mixer = build(config, width)
    params = jax.jit(mixer.init)(jax.random.key(seed), jnp.zeros((1, 2, width)))["params"]
    return by_path(params)


def shapes(config, width):
    """Shapes of the parameters by path; nothing is initialised."""
    mixer, x = build(config, width), jax.ShapeDtypeStruct((1, 2, width), jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)["params"]
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(k.key for k in path): leaf.shape for path, leaf in leaves}


def count(config, width):
    """Number of a mixer's parameters."""
    return sum(int(np.prod(shape)) for shape in shapes(config, width).values())


def assert_close(actual, expected, tolerance=tolerances.FLOAT32):
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    assert error < tolerance


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(x, 0)


def rms_norm(x, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)


def causal_conv(x, kernel, bias):
    """``(L, D)`` inputs, ``(W, D)`` taps, the newest token's last."""
    past = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
    return np.stack([bias + np.sum(kernel * past[t : t + len(kernel)], 0) for t in range(len(x))])
