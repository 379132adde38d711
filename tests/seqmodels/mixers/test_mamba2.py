"""Mamba-2 against token-by-token NumPy in float64; its initialisation and published sizes."""

import numpy as np
import pytest

from seqmodels.mixers import mamba2
from seqmodels.mixers.mamba2 import Mamba2Config
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

WIDTH, LENGTH = 4, 7


@pytest.mark.parametrize(
    "config",
    [
        Mamba2Config(state_size=3, head_size=2),
        Mamba2Config(
            state_size=2,
            head_size=2,
            groups=2,
            conv_size=2,
            use_bias=True,
            norm_epsilon=0.1,
            time_step_limit=(0.005, 0.02),
            implementation="reference",
        ),
    ],
)
def test_recurrence(config):
    p, x, y = initialised(config, WIDTH, LENGTH)
    inner, states, size, groups = 2 * WIDTH, config.state_size, config.head_size, config.groups
    heads, shared = inner // size, groups * states
    decay = -np.exp(p["A_log"])
    for u, out in zip(x, y, strict=True):
        parts = u @ p["in_proj/kernel"] + p.get("in_proj/bias", 0.0)
        z, parts, dt = np.split(parts, [inner, 2 * inner + 2 * shared], axis=-1)
        parts = silu(causal_conv(parts, p["conv1d/kernel"], p["conv1d/bias"]))
        values, b, c = np.split(parts, [inner, inner + shared], axis=-1)
        step = np.clip(softplus(dt + p["dt_bias"]), *config.time_step_limit)
        read = np.zeros((LENGTH, inner))
        for head in range(heads):
            channels = slice(head * size, (head + 1) * size)
            group = head // (heads // groups)
            of_group = slice(group * states, (group + 1) * states)
            memory = np.zeros((size, states))
            for t in range(LENGTH):
                token, d = values[t, channels], step[t, head]
                memory = np.exp(d * decay[head]) * memory + d * np.outer(token, b[t, of_group])
                read[t, channels] = memory @ c[t, of_group] + p["D"][head] * token
        gated = np.split(read * silu(z), groups, axis=-1)
        normed = np.concatenate([rms_norm(part, config.norm_epsilon) for part in gated], axis=-1)
        expected = (normed * p["norm/scale"]) @ p["out_proj/kernel"] + p.get("out_proj/bias", 0.0)
        assert_close(out, expected)


def test_initialisation():
    p = fresh(Mamba2Config(head_size=1, state_size=4, layers=4), 128)
    rate, step = np.exp(p["A_log"]), softplus(p["dt_bias"])
    assert 1 <= rate.min() < 1.3
    assert 15.7 < rate.max() <= 16
    np.testing.assert_allclose(np.mean(rate), 8.5, rtol=0.1)
    assert 0.999e-3 <= step.min() < 1.2e-3
    assert 8e-2 < step.max() <= 0.1001
    np.testing.assert_array_equal(p["D"], 1)
    np.testing.assert_array_equal(p["norm/scale"], 1)
    bounds = {
        "in_proj/kernel": 128**-0.5,
        "conv1d/kernel": 0.5,
        "conv1d/bias": 0.5,
        "out_proj/kernel": 256**-0.5 / 2,
    }
    for name, bound in bounds.items():
        assert 0.95 * bound < np.abs(p[name]).max() <= bound * (1 + 1e-6)
        np.testing.assert_allclose(np.std(p[name]), bound / 3**0.5, rtol=0.1)


def test_names_shapes_and_marks():
    names = shapes(mamba2.MAMBA2_130M.config, 768)
    assert names == {
        "A_log": (24,),
        "D": (24,),
        "conv1d/bias": (1792,),
        "conv1d/kernel": (4, 1792),
        "dt_bias": (24,),
        "in_proj/kernel": (768, 3352),
        "norm/scale": (1536,),
        "out_proj/kernel": (1536, 768),
    }
    labels = Mamba2Config().param_labels()
    assert set(labels) == {"A_log", "D", "dt_bias"}
    assert {(m.group, m.weight_decay, m.float32) for m in labels.values()} == {
        ("main", False, True)
    }


@pytest.mark.parametrize(
    ("size", "vocabulary", "tied", "parameters"),
    [
        (mamba2.MAMBA2_130M, 50288, True, 128_989_632),
        (mamba2.MAMBA2_370M, 50288, True, 368_346_624),
        (mamba2.MAMBA2_780M, 50288, True, 780_161_280),
        (mamba2.MAMBA2_1_3B, 50288, True, 1_343_757_312),
        (mamba2.MAMBA2_2_7B, 50288, True, 2_702_599_680),
        (mamba2.CODESTRAL_MAMBA_7B, 32768, False, 7_285_403_648),
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
        ({"head_size": 0}, "Mamba2Config: head_size=0 must be positive"),
        ({"layers": 0}, "layers=0 must be positive"),
        ({"time_step_limit": (0.1, 0.1)}, r"time_step_limit=\(0.1, 0.1\) must be a range"),
        ({"dt_max": 1e-4}, "0 < dt_min <= dt_max"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config(**change)


@pytest.mark.parametrize("change", [{"head_size": 3}, {"head_size": 4, "groups": 4}])
def test_heads_divide_channels_and_groups_divide_heads(change):
    with pytest.raises(ValueError, match=r"head_size=\d must divide expand \* width = 8"):
        shapes(Mamba2Config(**change), WIDTH)
