"""Mamba against token-by-token NumPy in float64; its initialisation and published sizes."""

import numpy as np
import pytest

from seqmodels.mixers import mamba
from seqmodels.mixers.mamba import MambaConfig
from tests import tolerances
from tests.seqmodels.mixers.oracles import (
    assert_close,
    causal_conv,
    count,
    fresh,
    initialised,
    rms_norm,
    shapes,
    silu,
    softplus,
)

WIDTH, LENGTH = 3, 7


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MambaConfig(state_size=5), marks=pytest.mark.full),
        MambaConfig(state_size=2, dt_rank=2, expand=3, conv_size=2, use_bias=True),
        MambaConfig(state_size=4, dt_rank=3, mixer_rms_eps=1e-2),
    ],
)
def test_recurrence(config):
    p, x, y = initialised(config, WIDTH, LENGTH)
    states = config.state_size
    channels, rank = config.expand * WIDTH, config.dt_rank or 1
    a = -np.exp(p["A_log"])
    for u, out in zip(x, y, strict=True):
        both = u @ p["in_proj/kernel"] + p.get("in_proj/bias", 0.0)
        inner, gate = both[:, :channels], both[:, channels:]
        inner = silu(causal_conv(inner, p["conv1d/kernel"], p["conv1d/bias"]))
        low, b, c = np.split(inner @ p["x_proj/kernel"], [rank, rank + states], axis=-1)
        if config.mixer_rms_eps:
            low, b, c = (rms_norm(part, config.mixer_rms_eps) for part in (low, b, c))
        step = softplus(low @ p["dt_proj/kernel"] + p["dt_proj/bias"])
        h, read = np.zeros((channels, states)), np.zeros((LENGTH, channels))
        for t in range(LENGTH):
            h = np.exp(step[t][:, None] * a) * h + np.outer(step[t] * inner[t], b[t])
            read[t] = h @ c[t] + p["D"] * inner[t]
        expected = (read * silu(gate)) @ p["out_proj/kernel"] + p.get("out_proj/bias", 0.0)
        assert_close(out, expected)


def test_initialisation():
    p = fresh(MambaConfig(layers=4), 64)
    np.testing.assert_allclose(
        np.exp(p["A_log"]), np.tile(np.arange(1, 17), (128, 1)), **tolerances.EACH_FLOAT32_TERMS
    )
    np.testing.assert_array_equal(p["D"], 1)
    step = softplus(p["dt_proj/bias"])
    assert 0.999e-3 <= step.min() < 2e-3
    assert 5e-2 < step.max() <= 0.1001
    bounds = {
        "in_proj/kernel": 64**-0.5,
        "conv1d/kernel": 0.5,
        "conv1d/bias": 0.5,
        "x_proj/kernel": 128**-0.5,
        "dt_proj/kernel": 0.5,
        "out_proj/kernel": 128**-0.5 / 2,  # one over the root of the depth
    }
    for name, bound in bounds.items():
        assert 0.95 * bound < np.abs(p[name]).max() <= bound * (1 + 1e-6)
        np.testing.assert_allclose(np.std(p[name]), bound / 3**0.5, rtol=0.15)


def test_marks():
    labels = MambaConfig().param_labels()
    assert set(labels) == {"A_log", "D", "dt_proj/bias"}
    assert {(m.group, m.weight_decay, m.float32) for m in labels.values()} == {
        ("main", False, True)
    }


def test_names_and_shapes_are_those_of_the_checkpoints():
    assert shapes(mamba.MAMBA_130M.config, 768) == {
        "A_log": (1536, 16),
        "D": (1536,),
        "conv1d/bias": (1536,),
        "conv1d/kernel": (4, 1536),
        "dt_proj/bias": (1536,),
        "dt_proj/kernel": (48, 1536),
        "in_proj/kernel": (768, 3072),
        "out_proj/kernel": (1536, 768),
        "x_proj/kernel": (1536, 80),
    }


@pytest.mark.parametrize(
    ("size", "vocabulary", "tied", "parameters"),
    [
        (mamba.MAMBA_130M, 50280, True, 129_135_360),
        pytest.param(mamba.MAMBA_370M, 50280, True, 371_516_416, marks=pytest.mark.full),
        pytest.param(mamba.MAMBA_790M, 50280, True, 793_204_224, marks=pytest.mark.full),
        pytest.param(mamba.MAMBA_1_4B, 50280, True, 1_372_178_432, marks=pytest.mark.full),
        pytest.param(mamba.MAMBA_2_8B, 50280, True, 2_768_345_600, marks=pytest.mark.full),
        (mamba.FALCON_MAMBA_7B, 65024, False, 7_272_665_088),
    ],
)
def test_published_sizes(size, vocabulary, tied, parameters):
    block = count(size.config, size.width) + size.width  # a norm before each mixer
    embeddings = (1 if tied else 2) * vocabulary * size.width
    assert size.layers == size.config.layers
    assert size.layers * block + embeddings + size.width == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_size": 0}, "MambaConfig: state_size=0 must be positive"),
        ({"dt_rank": 0}, "dt_rank=0 must be positive.* or None"),
        ({"mixer_rms_eps": -1.0}, "mixer_rms_eps=-1.0 must be positive.* or None"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MambaConfig(**change)
