"""RetNet against its equations; its decays, its size."""

import numpy as np

from seqmodels.mixers import RetNetConfig
from seqmodels.mixers.retnet import RETNET_1_3B, log_decays
from tests.seqmodels.mixers import matrix_oracle as oracle


def rotated(x):
    """``x (L, H, K)``: plane (i, i + K/2) turned by ``t 10000^(-2i/K)``."""
    half = x.shape[-1] // 2
    plane = x[..., :half] + 1j * x[..., half:]
    speed = 10000.0 ** (-np.arange(half) / half)
    plane = plane * np.exp(1j * np.arange(len(x))[:, None, None] * speed)
    return np.concatenate([plane.real, plane.imag], axis=-1)


def test_equations():
    config = RetNetConfig(heads=2, expand_k=2.0)
    p, inputs, outputs = oracle.applied(config)
    gamma = 1 - 2.0 ** -(5 + np.arange(2))
    for x, y in zip(inputs, outputs, strict=True):
        q, k, v, gate = (
            (x @ p[f"{name}_proj"]["kernel"]).reshape(len(x), 2, -1) for name in "qkvg"
        )
        o = oracle.attention(rotated(q), rotated(k), v, gamma[:, None], q.shape[-1] ** -0.5)
        o = oracle.rms(o) * p["o_norm"]["scale"] * oracle.silu(gate)
        oracle.assert_close(y, o.reshape(len(x), -1) @ p["o_proj"]["kernel"])


def test_decays():
    gamma = [0.96875, 0.984375, 0.9921875, 0.99609375]
    np.testing.assert_allclose(np.exp(log_decays(4).astype(np.float64)), gamma, rtol=1e-8)


def test_published_size():
    # 8 d^2 (section 3.1 of the paper) and the norm's scale.
    assert oracle.count(RETNET_1_3B, 2048) == 8 * 2048**2 + 512
