"""Attention, sliding windows, RAT and SCOUT token by token, as their papers decode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.config import from_dict, to_dict
from seqmodels.mixers import (
    AttentionConfig,
    MambaConfig,
    MixerConfig,
    RATConfig,
    SCOUTConfig,
    SlidingWindowConfig,
    build,
)
from seqmodels.mixers.rat import RAT_1_3B
from seqmodels.mixers.scout import SCOUT_1_6B, SCOUT_430M
from tests.seqmodels.mixers.oracles import assert_close, count, fresh, initialised, sigmoid

WIDTH, LENGTH = 8, 11


def turned(x, position, base, fraction=1.0):
    """Each head of ``x (H, K)`` rotated, pair by pair, as complex numbers."""
    if base is None:
        return x
    n = round(x.shape[1] * fraction) // 2
    pairs = x[:, :n] + 1j * x[:, n : 2 * n]
    pairs = pairs * np.exp(1j * position * base ** (-np.arange(n) / n))
    return np.concatenate([pairs.real, pairs.imag, x[:, 2 * n :]], axis=1)


def look(q, keys, values):
    """Attention of the heads ``q (H, K)`` to lists of ``(G, K)``; heads share groups in order."""
    o = []
    for head, part in enumerate(q):
        group = head * len(keys[0]) // len(q)
        scores = np.array([key[group] @ part for key in keys]) / np.sqrt(len(part))
        p = np.exp(scores - scores.max())
        o.append(sum(w * v[group] for w, v in zip(p / p.sum(), values, strict=True)))
    return np.concatenate(o)


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def attention(config, p, row, chosen, at=""):
    """``chosen(t)``: the tokens that token t sees."""

    def heads(name, t, norm=None):
        bias = p.get(f"{at}{name}/bias", 0.0)
        x = (row[t] @ p[f"{at}{name}/kernel"] + bias).reshape(-1, size)
        if norm is None:
            return x
        if config.qk_norm:
            x = rms(x, p[f"{at}{norm}/scale"])
        return turned(x, t, config.rotary_base, config.rotary_fraction)

    size = config.head_size or WIDTH // config.heads
    keys = [heads("k_proj", t, "k_norm") for t in range(len(row))]
    values = [heads("v_proj", t) for t in range(len(row))]
    o = [
        look(heads("q_proj", t, "q_norm"), [keys[s] for s in seen], [values[s] for s in seen])
        for t, seen in enumerate(map(chosen, range(len(row))))
    ]
    return np.stack(o) @ p[f"{at}o_proj/kernel"] + p.get(f"{at}o_proj/bias", 0.0)


def check(config, chosen):
    p, x, y = initialised(config, WIDTH, LENGTH)
    for row, out in zip(x, y, strict=True):
        assert_close(out, attention(config, p, row, chosen))


@pytest.mark.always("options1")
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"heads": 4, "kv_heads": 2, "qk_norm": True, "use_bias": True},
        {"heads": 4, "kv_heads": 1, "head_size": 6, "rotary_base": None},
        {"heads": 2, "rotary_base": 100.0, "rotary_fraction": 0.5},
    ],
)
def test_attention(options):
    check(AttentionConfig(init_std=0.5, **options), lambda t: range(t + 1))


def test_bidirectional_attention():
    check(AttentionConfig(heads=2, init_std=0.5, bidirectional=True), lambda t: range(LENGTH))


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (3, 2)])
def test_sliding_window(window, sinks):
    config = SlidingWindowConfig(heads=2, kv_heads=1, window=window, sinks=sinks, init_std=0.5)
    check(config, lambda t: [s for s in range(t + 1) if s < sinks or t - s < window])


@pytest.mark.always("1-1-1", "3-4-2")
@pytest.mark.parametrize(
    ("chunk", "heads", "groups"), [(1, 1, 1), (3, 4, 2), (4, 2, 1), (20, 2, 2)]
)
def test_rat(chunk, heads, groups):
    config = RATConfig(chunk=chunk, heads=heads, groups=groups, init_std=0.5)
    p, x, y = initialised(config, WIDTH, LENGTH)
    size = WIDTH // heads
    cuts = np.cumsum([WIDTH, WIDTH, WIDTH, groups * size])
    for row, out in zip(x, y, strict=True):
        ends_k, ends_v, expected = [], [], []
        for t, token in enumerate(row):
            z, v, gate, q, k = np.split(token @ p["in_proj/kernel"], cuts)
            q, k = (np.concatenate([part] * (heads // groups)) for part in (q, k))
            if t % chunk == 0:
                running_k = running_v = np.zeros(WIDTH)
            f = sigmoid(gate + p["gate_bias"])
            running_k = f * running_k + (1 - f) * k
            running_v = f * running_v + (1 - f) * v
            own_k = turned(running_k.reshape(heads, size), t // chunk, config.rotary_base)
            own_v = running_v.reshape(heads, size)
            q = turned(q.reshape(heads, size), t // chunk, config.rotary_base)
            o = look(q, [*ends_k, own_k], [*ends_v, own_v])
            expected.append(sigmoid(z) * o @ p["out_proj/kernel"])
            if t % chunk == chunk - 1:
                ends_k.append(own_k)
                ends_v.append(own_v)
        assert_close(out, np.stack(expected))


def checkpoints(interval):
    return lambda t: [s for s in range(t) if s % interval == interval - 1] + [t]


@pytest.mark.parametrize("interval", [1, 3, 20])
def test_scout(interval):
    check(SCOUTConfig(heads=2, kv_heads=1, interval=interval, init_std=0.5), checkpoints(interval))


def test_scout_behind_a_sliding_window():
    local = SlidingWindowConfig(heads=2, window=3, init_std=0.5)
    config = SCOUTConfig(heads=2, interval=4, local=local, init_std=0.5)
    p, x, y = initialised(config, WIDTH, LENGTH)
    for row, out in zip(x, y, strict=True):
        near = attention(local, p, row, lambda t: range(max(0, t - 2), t + 1), at="local/")
        mixed = rms(row + near, p["norm/scale"])
        assert_close(out, near + attention(config, p, mixed, checkpoints(4)))


def test_a_local_mixer_keeps_its_labels_and_its_place_in_the_config():
    config = SCOUTConfig(heads=2, local=MambaConfig())
    assert config.param_labels() == {
        f"local/{name}": m for name, m in MambaConfig().param_labels().items()
    }
    assert config.param_labels()
    assert from_dict(MixerConfig, to_dict(config)) == config


@pytest.mark.parametrize("chunk", [2, 16])
def test_rat_remembers_at_first_for_up_to_a_chunk(chunk):
    bias = fresh(RATConfig(chunk=chunk, heads=2), 64)["gate_bias"]
    assert np.all((bias >= 0) & (bias <= np.log(chunk - 1) + 1e-6))
    assert chunk == 2 or bias.std() > 0.3


def test_published_sizes():
    width, layers, rat = RAT_1_3B
    norms, mlp, vocabulary = 2 * width, 8 * width**2, 32000
    total = layers * (count(rat, width) + mlp + norms) + vocabulary * width + width
    assert round(total / 1e9, 2) == 1.30
    for (width, layers, scout), mlp, tables, size in (
        (SCOUT_430M, 2816, 1, 0.43),
        (SCOUT_1_6B, 5632, 2, 1.59),
    ):
        mixers = count(scout, width) + count(MambaConfig(dt_rank=128), width)
        layer = mixers + 2 * 3 * width * mlp + 4 * width
        assert round((layers * layer + tables * vocabulary * width + width) / 1e9, 2) == size


@pytest.mark.parametrize(
    ("config", "bytes_at_100"),
    [
        (AttentionConfig(heads=4, kv_heads=2), 2 * 2 * 100 * 4),
        (SlidingWindowConfig(heads=4, kv_heads=2, window=10, sinks=3), 2 * 2 * 13 * 4),
        (RATConfig(chunk=16, heads=4), 2 * 2 * 6 * 8 + 4 * 2 * 8),
        (SCOUTConfig(heads=4, kv_heads=2, interval=10), 2 * 2 * 10 * 4),
        (
            SCOUTConfig(heads=4, local=SlidingWindowConfig(heads=4, window=5)),
            2 * 2 * 10 * 8 + 2 * 2 * 5 * 8 + 8,
        ),
    ],
)
def test_bytes_of_the_state(config, bytes_at_100):
    assert build(config, WIDTH).state_bytes(100) == bytes_at_100 + 8  # position and segment


def test_a_sliding_window_does_not_grow():
    mixer = build(SlidingWindowConfig(heads=2, window=4), WIDTH)
    assert mixer.state_bytes(10**6) == mixer.state_bytes(1)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (AttentionConfig, {"kv_heads": 3}, "kv_heads=3 must divide heads=16"),
        (AttentionConfig, {"heads": 0}, "heads=0 must be positive"),
        (AttentionConfig, {"rotary_fraction": 0.0}, r"rotary_fraction=0.0 must be in \(0, 1\]"),
        (SlidingWindowConfig, {"window": 0}, "window=0 must be positive"),
        (SlidingWindowConfig, {"sinks": -1}, "sinks=-1 must be at least 0"),
        (RATConfig, {"chunk": 0}, "chunk=0 must be positive"),
        (RATConfig, {"groups": 3}, "groups=3 must divide heads=16"),
        (SCOUTConfig, {"interval": 0}, "interval=0 must be positive"),
        (SCOUTConfig, {"local": AttentionConfig(bidirectional=True)}, "must be causal"),
    ],
)
def test_bad_configs_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config(), **change)


@pytest.mark.parametrize("config", [AttentionConfig(heads=3), RATConfig(heads=3, groups=1)])
def test_widths_have_to_divide(config):
    with pytest.raises(ValueError, match="heads=3 must divide the width 8"):
        jax.eval_shape(build(config, WIDTH).init, jax.random.key(0), jnp.zeros((1, 2, WIDTH)))
