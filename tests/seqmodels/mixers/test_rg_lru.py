"""Griffin's recurrent block against token-by-token NumPy in float64; initialisation and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers import Segments, build
from seqmodels.mixers.rg_lru import (
    GRIFFIN_7B,
    RECURRENTGEMMA_2B,
    RGLRUConfig,
    bounded_sqrt,
)
from tests import tolerances
from tests.seqmodels.mixers.oracles import (
    assert_close,
    by_path,
    causal_conv,
    count,
    fresh,
    initialised,
    shapes,
    sigmoid,
    softplus,
)

WIDTH, LENGTH = 4, 7


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def oracle(p, u, heads):
    def block_diagonal(x, name):
        out = [
            part @ w + b
            for part, w, b in zip(
                np.split(x, heads),
                p[f"rg_lru/{name}_weight"],
                p[f"rg_lru/{name}_bias"],
                strict=True,
            )
        ]
        return sigmoid(np.concatenate(out))

    x = causal_conv(
        u @ p["linear_x/kernel"] + p["linear_x/bias"], p["conv_1d/kernel"], p["conv_1d/bias"]
    )
    h, out = np.zeros(x.shape[1]), []
    for t, token in enumerate(x):
        r, i = block_diagonal(token, "recurrent_gate"), block_diagonal(token, "input_gate")
        a = np.exp(-8 * r * softplus(p["rg_lru/recurrent_param"]))
        h = i * token if t == 0 else a * h + np.sqrt(1 - a**2) * i * token
        out.append(h)
    y = gelu(u @ p["linear_y/kernel"] + p["linear_y/bias"]) * np.stack(out)
    return y @ p["linear_out/kernel"] + p["linear_out/bias"]


@pytest.mark.parametrize(
    "config",
    [
        RGLRUConfig(heads=2),
        RGLRUConfig(lru_width=6, heads=3, conv_size=2, implementation="reference"),
    ],
)
def test_recurrence(config):
    p, x, y = initialised(config, WIDTH, LENGTH)
    for u, out in zip(x, y, strict=True):
        assert_close(out, oracle(p, u, config.heads))


def test_each_document_begins_with_a_root_of_one():
    config = RGLRUConfig(heads=1, implementation="reference")
    mixer = build(config, WIDTH)
    x = jax.random.normal(jax.random.key(1), (1, 6, WIDTH))
    variables = jax.jit(mixer.init)(jax.random.key(0), x)
    ids = jnp.array([[5, 5, 5, 8, 8, 8]], jnp.int32)
    y, _ = jax.jit(mixer.apply)(variables, x, segments=Segments.from_ids(ids))
    p = by_path(variables["params"])
    for part in (slice(0, 3), slice(3, 6)):
        assert_close(np.asarray(y)[0, part], oracle(p, np.asarray(x, np.float64)[0, part], 1))


def test_the_root_has_a_bounded_derivative():
    x = jnp.array([0.0, 1e-9, 0.25, 1.0])
    value, slope = jax.jvp(bounded_sqrt, (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(value, np.sqrt(x))
    np.testing.assert_allclose(slope, [1000, 1000, 1, 0.5], **tolerances.EACH_FLOAT32_TERMS)


def test_initialisation():
    p = fresh(RGLRUConfig(lru_width=1024, heads=16, conv_size=4, layers=8), 64)
    decay = np.exp(-softplus(p["rg_lru/recurrent_param"]))
    assert 0.9 <= decay.min() < 0.901
    assert 0.998 < decay.max() < 0.9991
    np.testing.assert_allclose(np.mean(decay**2), (0.9**2 + 0.999**2) / 2, rtol=5e-3)
    variances = {
        "linear_x/kernel": 1 / 64,
        "linear_y/kernel": 1 / 64,
        "linear_out/kernel": 2 / 8 / 1024,
        "conv_1d/kernel": 0.01 / 4,
        "rg_lru/recurrent_gate_weight": 1 / 64,
        "rg_lru/input_gate_weight": 1 / 64,
    }
    for name, variance in variances.items():
        np.testing.assert_allclose(np.var(p[name]), variance, rtol=0.1)
    assert all(not np.any(part) for name, part in p.items() if name.endswith("bias"))


def test_names_shapes_and_marks():
    names = shapes(RGLRUConfig(lru_width=6, heads=3), WIDTH)
    assert names == {
        "conv_1d/bias": (6,),
        "conv_1d/kernel": (4, 6),
        "linear_out/bias": (4,),
        "linear_out/kernel": (6, 4),
        "linear_x/bias": (6,),
        "linear_x/kernel": (4, 6),
        "linear_y/bias": (6,),
        "linear_y/kernel": (4, 6),
        "rg_lru/input_gate_bias": (3, 2),
        "rg_lru/input_gate_weight": (3, 2, 2),
        "rg_lru/recurrent_gate_bias": (3, 2),
        "rg_lru/recurrent_gate_weight": (3, 2, 2),
        "rg_lru/recurrent_param": (6,),
    }
    ((name, label),) = RGLRUConfig().param_labels().items()
    assert name in names
    assert (label.group, label.weight_decay, label.float32) == ("main", False, True)


def test_published_sizes():
    size = RECURRENTGEMMA_2B
    width, hidden = size.width, 3 * size.width
    mlp = 2 * (width * hidden + hidden) + hidden * width + width
    attention = 2 * width * width + width + 2 * width * 256  # 10 heads of 256, one of keys
    layers = size.config.layers
    total = size.layers * count(size.config, width) + (layers - size.layers) * attention
    total += layers * (mlp + 2 * width) + 256_000 * width + width
    assert total == 2_682_862_080
    assert count(GRIFFIN_7B.config, GRIFFIN_7B.width) == 3 * 4096 * 5632 + 4096 + 5632 * (
        2 + 5 + 2 * (5632 // 32) + 3
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "RGLRUConfig: heads=0 must be positive"),
        ({"lru_width": -1}, "lru_width=-1 must be positive"),
        ({"r_max": 1.0}, r"r_max=1.0 must be in \(0, 1\)"),
        ({"r_max": 0.8}, "0 < r_min < r_max < 1, got r_min=0.9 and r_max=0.8"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RGLRUConfig(**change)


def test_heads_divide_the_channels():
    with pytest.raises(ValueError, match="heads=3 must divide the 4 channels"):
        shapes(RGLRUConfig(heads=3), WIDTH)
