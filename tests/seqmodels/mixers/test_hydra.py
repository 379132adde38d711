"""Hydra against its matrix, built entry by entry in float64; its initialisation and size."""

import jax
import numpy as np
import pytest

from seqmodels.mixers import Segments, build
from seqmodels.mixers.hydra import HYDRA_BERT, HydraConfig
from tests.seqmodels.mixers.oracles import (
    assert_close,
    count,
    fresh,
    initialised,
    rms_norm,
    shapes,
    silu,
    softplus,
)

WIDTH, LENGTH = 4, 6


def convolve(x, kernel, bias):
    """Zeros beyond both ends of ``(L, D)``."""
    reach = len(kernel) // 2
    wide = np.pad(x, ((reach, reach), (0, 0)))
    return np.stack([bias + np.sum(kernel * wide[t : t + len(kernel)], 0) for t in range(len(x))])


def quasiseparable(step, rate, b, c):
    """``M_ij = C_{i-1} . B_j Δ_j exp(-rate sum_{j<m<i} Δ_m)`` for ``j < i``, else 0."""
    matrix = np.zeros((LENGTH, LENGTH))
    for i in range(LENGTH):
        for j in range(i):
            decay = np.exp(-rate * np.sum(step[j + 1 : i]))
            matrix[i, j] = c[i - 1] @ b[j] * step[j] * decay
    return matrix


@pytest.mark.parametrize(
    "config",
    [
        HydraConfig(state_size=3, head_size=2),
        HydraConfig(
            state_size=2,
            head_size=2,
            groups=2,
            conv_size=3,
            use_bias=True,
            implementation="reference",
        ),
    ],
)
def test_matrix(config):
    p, x, y = initialised(config, WIDTH, LENGTH)
    inner, states, size, groups = 2 * WIDTH, config.state_size, config.head_size, config.groups
    heads, shared = inner // size, groups * states
    for u, out in zip(x, y, strict=True):
        parts = u @ p["in_proj/kernel"] + p.get("in_proj/bias", 0.0)
        z, parts, dt = np.split(parts, [inner, 2 * inner + 4 * shared], axis=-1)
        parts = silu(convolve(parts, p["conv1d/kernel"], p["conv1d/bias"]))
        values, *bc = np.split(parts, [inner + i * shared for i in range(4)], axis=-1)
        bc = [part.reshape(LENGTH, groups, states) for part in bc]
        steps = [softplus(part + p["dt_bias"]) for part in np.split(dt, 2, axis=-1)]
        factor = values @ p["fc_D/kernel"] + p["D"]
        read = np.zeros((LENGTH, inner))
        for head in range(heads):
            channels, group = slice(head * size, (head + 1) * size), head // (heads // groups)
            rate = np.exp(p["A_log"][head])
            left = quasiseparable(steps[0][:, head], rate, bc[0][:, group], bc[1][:, group])
            turned = (part[::-1] for part in (bc[2][:, group], bc[3][:, group]))
            right = quasiseparable(steps[1][::-1, head], rate, *turned)
            matrix = left + right[::-1, ::-1] + np.diag(factor[:, head])
            read[:, channels] = matrix @ values[:, channels]
        normed = rms_norm(read, config.norm_epsilon) * p["norm/scale"] * silu(z)
        expected = normed @ p["out_proj/kernel"] + p.get("out_proj/bias", 0.0)
        assert_close(out, expected)


def test_padding_is_as_if_the_row_ended():
    mixer = build(HydraConfig(state_size=2, head_size=4, implementation="reference"), WIDTH)
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
    variables = jax.jit(mixer.init)(jax.random.key(0), x)
    run = jax.jit(mixer.apply)
    ids = np.array([[7] * 4 + [0] * 2], np.int32)
    y, _ = run(variables, x, segments=Segments.from_ids(ids, single=True))
    short, _ = run(variables, x[:, :4])
    assert_close(np.asarray(y)[:, :4], np.asarray(short))
    assert not np.any(np.asarray(y)[:, 4:])


def test_initialisation_names_and_marks():
    config = HydraConfig(state_size=4, head_size=1)
    p = fresh(config, 64)
    step = softplus(p["dt_bias"])
    assert 0.999e-3 <= step.min() < 1.2e-3
    assert 8e-2 < step.max() <= 0.1001
    np.testing.assert_array_equal(p["A_log"], 0)
    np.testing.assert_array_equal(p["D"], 1)
    np.testing.assert_allclose(np.std(p["conv1d/kernel"]), (7 * 3) ** -0.5, rtol=0.1)
    assert {name: part.shape for name, part in p.items()} == {
        "A_log": (128,),
        "D": (128,),
        "conv1d/bias": (144,),
        "conv1d/kernel": (7, 144),
        "dt_bias": (128,),
        "fc_D/kernel": (128, 128),
        "in_proj/kernel": (64, 528),
        "norm/scale": (128,),
        "out_proj/kernel": (128, 64),
    }
    assert set(config.param_labels()) == {"A_log", "D", "dt_bias"}


def test_published_size():
    width = HYDRA_BERT.width
    block = count(HYDRA_BERT.config, width) + 2 * width  # a layer norm with each mixer
    embeddings = (30_522 + 512 + 2) * width
    head = width * width + width + 2 * width
    assert round((HYDRA_BERT.layers * block + embeddings + head) / 1e6) == 112


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="HydraConfig: conv_size=4 must be odd"):
        HydraConfig(conv_size=4)
    with pytest.raises(ValueError, match="head_size=64 must divide"):
        shapes(HydraConfig(), WIDTH)
