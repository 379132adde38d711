"""RetNet against its equations; its decays, its size."""

import numpy as np

from seqmodels.mixers import RetNetConfig
from seqmodels.mixers.retnet import RETNET_1_3B, log_decays
from tests import tolerances
from tests.seqmodels.mixers import matrix_oracle, oracles
from tests.seqmodels.mixers.matrix_oracle import heads, output_projection

WIDTH, LENGTH = 4, 9


def rotated(x):
    """``x (L, H, K)``: plane (i, i + K/2) turned by ``t 10000^(-2i/K)``."""
    half = x.shape[-1] // 2
    plane = x[..., :half] + 1j * x[..., half:]
    speed = 10000.0 ** (-np.arange(half) / half)
    plane = plane * np.exp(1j * np.arange(len(x))[:, None, None] * speed)
    return np.concatenate([plane.real, plane.imag], axis=-1)


def test_equations():
    config = RetNetConfig(heads=2, expand_k=2.0, init_std=0.5)
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    gamma = 1 - 2.0 ** -(5 + np.arange(2))
    for x, y in zip(inputs, outputs, strict=True):
        q, k, v, gate = (heads(x @ p[f"{name}_proj/kernel"], 2) for name in "qkvg")
        o = matrix_oracle.attention(rotated(q), rotated(k), v, gamma[:, None], 4**-0.5)
        oracles.assert_close(y, output_projection(o, p, oracles.silu(gate)))


def test_decays():
    gamma = [0.96875, 0.984375, 0.9921875, 0.99609375]
    np.testing.assert_allclose(
        np.exp(log_decays(4).astype(np.float64)), gamma, **tolerances.EACH_FLOAT64_DECAY
    )


def test_published_size():
    # 8 d^2, as the paper has it, and the norm's scale.
    assert matrix_oracle.count(RETNET_1_3B) == 8 * 2048**2 + 512
