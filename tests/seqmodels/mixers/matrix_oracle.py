"""Recurrences of matrices, token by token in NumPy; the parameters of published sizes."""

import numpy as np

from tests.seqmodels.mixers import oracles


def heads(x, count):
    """``(L, N)`` -> ``(L, count, N / count)``."""
    return x.reshape(len(x), count, -1)


def unit(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def convolved(x, p, name):
    """A projection, its short convolution, silu."""
    conv_size = p[f"{name}_conv/kernel"]
    return oracles.silu(oracles.causal_conv(x @ p[f"{name}_proj/kernel"], conv_size, 0.0))


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


def output_projection(o, p, gate=1.0):
    """Norm over the last axis, scale, gate, the map to the outputs."""
    o = oracles.rms_norm(o, 1e-5) * p["o_norm/scale"] * gate
    return o.reshape(len(o), -1) @ p["o_proj/kernel"]


def count(published):
    return oracles.count(published.config, published.width)
