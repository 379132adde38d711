"""Kimi Delta Attention against its equations; its initial decays, its size."""

import numpy as np
import pytest

from seqmodels.mixers import KDAConfig
from seqmodels.mixers.base import ParamLabel
from seqmodels.mixers.kda import KIMI_LINEAR
from tests.seqmodels.mixers import matrix_oracle, oracles
from tests.seqmodels.mixers.matrix_oracle import convolved, heads, output_projection, unit

WIDTH, LENGTH = 4, 9


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(KDAConfig(heads=2, head_size=3, init_std=0.5), marks=pytest.mark.full),
        KDAConfig(heads=2, head_size=3, gate_bias=False, log_decay_bound=-5.0, init_std=0.5),
    ],
)
def test_equations(config):
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    for x, y in zip(inputs, outputs, strict=True):
        q, k, v = (heads(convolved(x, p, name), 2) for name in "qkv")
        beta = oracles.sigmoid(x @ p["b_proj/kernel"])
        f = heads(x @ p["f_proj/down/kernel"] @ p["f_proj/up/kernel"], 2) + p["dt_bias"]
        rate = np.exp(p["A_log"])[:, None]
        log_decay = -rate * oracles.softplus(f)
        if config.log_decay_bound is not None:
            log_decay = -5 * oracles.sigmoid(rate * f)
        o = matrix_oracle.delta_rule(unit(q), unit(k), v, beta, np.exp(log_decay))
        gate = x @ p["g_proj/down/kernel"] @ p["g_proj/up/kernel"]
        gate = heads(gate + p["g_proj/up/bias"] if config.gate_bias else gate, 2)
        oracles.assert_close(y, output_projection(o, p, oracles.sigmoid(gate)))


@pytest.mark.full
def test_initial_decays_and_marks():
    p = oracles.fresh(KDAConfig(heads=512, head_size=1), WIDTH)
    rate, step = np.exp(p["A_log"]), oracles.softplus(p["dt_bias"])
    assert 1 <= rate.min() < 1.5
    assert 15.5 < rate.max() <= 16
    assert p["dt_bias"].shape == (512, 1)
    assert 0.99e-3 < step.min() < 1.2e-3
    assert 0.08 < step.max() < 0.101
    bounded = KDAConfig(heads=2, head_size=1, log_decay_bound=-5.0)
    assert not np.any(oracles.fresh(bounded, WIDTH)["A_log"])
    kept = ParamLabel(weight_decay=False, float32=True)
    assert bounded.param_labels() == {"A_log": kept, "dt_bias": kept}


def test_published_size():
    width, inner = 2304, 32 * 128
    matrices = 4 * width * inner + 2 * (width * 128 + 128 * inner) + width * 32
    assert matrix_oracle.count(KIMI_LINEAR) == matrices + 3 * 4 * inner + 32 + inner + 128


def test_bad_bounds_are_refused():
    with pytest.raises(ValueError, match=r"log_decay_bound=5\.0 must be negative"):
        KDAConfig(log_decay_bound=5.0)
