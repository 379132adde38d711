"""Mixers with matrix states, written from their equations: NumPy, float64, token by token."""

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.mixers import build

WIDTH, LENGTH = 4, 9


def applied(config, width=WIDTH):
    """Random parameters (float64), inputs ``(2, L, width)`` and the mixer's outputs."""
    mixer = build(config, width)
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, width))
    rng = np.random.default_rng(0)

    def other(leaf):
        return leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
    start = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    variables = jax.tree.map(other, start)
    y, _ = jax.jit(mixer.apply)(variables, x)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    return params, np.asarray(x, np.float64), np.asarray(y)


def initial_parameters(config, width=WIDTH):
    mixer = build(config, width)
    return jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 2, width)))["params"]


def count(config, width):
    """Parameters of a mixer that is never made."""
    mixer, x = build(config, width), jax.ShapeDtypeStruct((1, 2, width), jnp.bfloat16)
    shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def assert_close(actual, expected):
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    assert error < 2e-6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def convolve(x, weight):
    """``silu(sum_j weight_j x_{t-(W-1)+j})`` of ``x (L, D)``."""
    padded = np.concatenate([np.zeros((len(weight) - 1, x.shape[1])), x])
    return silu(sum(w * padded[j : j + len(x)] for j, w in enumerate(weight)))


def attention(q, k, v, decay, scale):
    """``q, k (L, H, K)``, ``v (L, H, V)``; ``decay`` a factor that broadcasts to ``(L, H, K)``."""
    decay = np.broadcast_to(decay, k.shape)
    state, out = np.zeros((*k.shape[1:], v.shape[2])), []
    for t in range(len(q)):
        state = decay[t][..., None] * state + k[t][..., None] * v[t][:, None]
        out.append(scale * np.einsum("hk,hkv->hv", q[t], state))
    return np.stack(out)


def delta_rule(q, k, v, beta, decay):
    """As ``attention``, scaled by ``K^(-1/2)``; ``beta (L, H)``."""
    decay = np.broadcast_to(decay, k.shape)
    state, out = np.zeros((*k.shape[1:], v.shape[2])), []
    for t in range(len(q)):
        state = decay[t][..., None] * state
        error = v[t] - np.einsum("hk,hkv->hv", k[t], state)
        state = state + (beta[t][:, None] * k[t])[..., None] * error[:, None]
        out.append(np.einsum("hk,hkv->hv", q[t], state) / np.sqrt(q.shape[2]))
    return np.stack(out)
