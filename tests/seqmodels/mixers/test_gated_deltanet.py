"""Gated DeltaNet against its equations; its initial decays, its sizes."""

import numpy as np
import pytest

from seqmodels.mixers import GatedDeltaNetConfig
from seqmodels.mixers.base import ParamLabel
from seqmodels.mixers.gated_deltanet import GATED_DELTANET_1_3B, QWEN3_NEXT
from tests.seqmodels.mixers import matrix_oracle, oracles
from tests.seqmodels.mixers.matrix_oracle import convolved, heads, output_projection, unit

WIDTH, LENGTH = 4, 9


def test_equations():
    config = GatedDeltaNetConfig(
        heads=4, key_heads=2, head_size=2, expand_v=1.5, conv_size=3, init_std=0.5
    )
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    for x, y in zip(inputs, outputs, strict=True):
        q, k = (unit(heads(convolved(x, p, name), 2)).repeat(2, axis=1) for name in "qk")
        v = heads(convolved(x, p, "v"), 4)
        beta = oracles.sigmoid(x @ p["b_proj/kernel"])
        step = oracles.softplus(x @ p["a_proj/kernel"] + p["dt_bias"])
        decay = np.exp(-np.exp(p["A_log"]) * step)
        o = matrix_oracle.delta_rule(q, k, v, beta, decay[..., None])
        gate = heads(x @ p["g_proj/kernel"], 4)
        oracles.assert_close(y, output_projection(o, p, oracles.silu(gate)))


def test_initial_decays_and_marks():
    config = GatedDeltaNetConfig(heads=512, head_size=1)
    p = oracles.fresh(config, WIDTH)
    rate, step = np.exp(p["A_log"]), oracles.softplus(p["dt_bias"])
    assert 0 < rate.min() < 0.5
    assert 15.5 < rate.max() <= 16
    np.testing.assert_allclose(np.mean(rate), 8, rtol=0.1)
    assert 0.99e-3 < step.min() < 1.2e-3
    assert 0.08 < step.max() < 0.101
    np.testing.assert_allclose(np.mean(np.log(step)), np.log(1e-2), rtol=0.05)
    kept = ParamLabel(weight_decay=False, float32=True)
    assert config.param_labels() == {"A_log": kept, "dt_bias": kept}


def test_published_sizes():
    # q, k, v, gate, output: 6 d^2 in all, as the paper counts.
    small = 2 * 2048 * 6 + 2 * 6 + 512
    assert matrix_oracle.count(GATED_DELTANET_1_3B) == 6 * 2048**2 + 4 * (1536 * 2 + 3072) + small
    # Two input maps of 12288 and 64 channels, one convolution over 8192.
    qwen = 2048 * 12288 + 2048 * 64 + 4 * 8192 + 2 * 32 + 128 + 4096 * 2048
    assert matrix_oracle.count(QWEN3_NEXT) == qwen


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="key_heads=4 must divide heads=6"):
        GatedDeltaNetConfig(key_heads=4)
    with pytest.raises(ValueError, match=r"values of 10 channels .* into heads=4"):
        oracles.shapes(GatedDeltaNetConfig(heads=4, head_size=2, expand_v=1.25), WIDTH)
