"""Mamba-3 against its recurrence, token by token in NumPy."""

import numpy as np
import pytest

from seqmodels.mixers import Mamba3Config
from seqmodels.mixers.base import NO_DECAY_LABEL
from tests.seqmodels.mixers.oracles import (
    assert_close,
    fresh,
    initialised,
    rms_norm,
    shapes,
    sigmoid,
    silu,
    softplus,
)

WIDTH, LENGTH = 4, 9


def turned(x, angles):
    """Complex numbers on channels 2 i and 2 i + 1, times ``exp(i angle)``."""
    size = 2 * len(angles)
    z = (x[:size:2] + 1j * x[1:size:2]) * np.exp(1j * angles)
    return np.concatenate([np.stack([z.real, z.imag], axis=1).ravel(), x[size:]])


@pytest.mark.parametrize(
    "config",
    [
        Mamba3Config(state_size=6, head_size=4),
        Mamba3Config(state_size=4, head_size=2, groups=2, rotary_fraction=1.0, norm=True),
        Mamba3Config(state_size=5, head_size=4, rank=3, groups=2, implementation="reference"),
    ],
)
def test_recurrence(config):
    p, inputs, outputs = initialised(config, WIDTH, LENGTH)
    inner, size, states, rank = 2 * WIDTH, config.head_size, config.state_size, config.rank
    heads, shared = inner // size, config.groups * rank * states
    ends = np.cumsum([inner, inner, shared, shared, heads, heads, heads])
    one = np.ones((heads, 1, size))
    into, gates, out_of = (p.get(f"mimo_{name}", one) for name in "xzo")
    for u, out in zip(inputs, outputs, strict=True):
        z, x, b, c, dt, a, trap, angle = np.split(u @ p["in_proj/kernel"], ends, axis=-1)
        step, share = softplus(dt + p["dt_bias"]), sigmoid(trap)
        rate = -np.where(a >= 0, 1 + a, 1 / (1 - np.minimum(a, 0)))
        keys = {
            name: rms_norm(part.reshape(LENGTH, config.groups, rank, states), 1e-5)
            * p[f"{name}_norm/scale"]
            for name, part in (("B", b), ("C", c))
        }
        y = np.zeros((LENGTH, heads, size))
        for h in range(heads):
            group, channels = h // (heads // config.groups), slice(h * size, (h + 1) * size)
            memory, phase, before = np.zeros((states, size)), 0.0, np.zeros((states, size))
            for t in range(LENGTH):
                phase = phase + np.pi * np.tanh(angle[t]) * step[t, h]
                k, q = (
                    np.stack(
                        [
                            turned(keys[name][t, group, r] + p[f"{name}_bias"][h, r], phase)
                            for r in range(rank)
                        ]
                    )
                    for name in "BC"
                )
                v = x[t, channels] * into[h]
                decay = np.exp(rate[t, h] * step[t, h])
                write = k.T @ v
                memory = decay * memory + (1 - share[t, h]) * step[t, h] * decay * before
                memory = memory + share[t, h] * step[t, h] * write
                before = write
                read = q @ memory + p["D"][h] * v
                if not config.norm:
                    read = read * silu(z[t, channels] * gates[h])
                y[t, h] = np.sum(read * out_of[h], axis=0)
        if config.norm:
            y = rms_norm(y, config.norm_epsilon) * p["norm/scale"].reshape(heads, size)
            y = y * silu(z.reshape(y.shape))
        assert_close(out, y.reshape(LENGTH, -1) @ p["out_proj/kernel"])


def test_initialisation_names_and_marks():
    config = Mamba3Config(head_size=2, state_size=4, rank=2)
    p = fresh(config, 64)
    step = softplus(p["dt_bias"])
    assert 0.99e-3 <= step.min() < 2e-3
    assert 5e-2 < step.max() <= 0.1001
    for name, value in {"B_bias": 1, "C_bias": 1, "D": 1, "mimo_x": 0.5, "mimo_z": 1}.items():
        np.testing.assert_array_equal(p[name], value)
    np.testing.assert_array_equal(p["mimo_o"], 0.5)
    assert set(config.param_labels().values()) == {NO_DECAY_LABEL}
    # z, x, B, C, dt, a, trap; 32 angles.
    assert shapes(Mamba3Config(), 768)["in_proj/kernel"] == (768, 2 * 1536 + 256 + 3 * 24 + 32)


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="norm=True needs rank=1, not 2"):
        Mamba3Config(rank=2, norm=True)
    with pytest.raises(ValueError, match=r"rotary_fraction=0.1 of state_size=8 .* no pair"):
        Mamba3Config(state_size=8, rotary_fraction=0.1)
    with pytest.raises(ValueError, match="head_size=64 must divide expand \\* width = 8"):
        shapes(Mamba3Config(), 4)
