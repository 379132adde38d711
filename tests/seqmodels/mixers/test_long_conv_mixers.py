"""SGConv, Hyena, Monarch and Orchid against the matrices that they apply; their own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.layers.monarch import MonarchDense
from seqmodels.mixers import (
    HyenaConfig,
    MonarchConfig,
    OrchidConfig,
    Segments,
    SGConvConfig,
    build,
)
from seqmodels.mixers.hyena import HYENA_153M
from tests import tolerances
from tests.seqmodels.mixers import oracles

WIDTH, LENGTH = 4, 13


def toeplitz(left, right=None):
    """``(H, L, L)``: ``left_j`` of the token j before, ``right_j`` of that 1 + j behind."""
    matrix = np.zeros((len(left), LENGTH, LENGTH))
    for t in range(LENGTH):
        for s in range(LENGTH):
            if 0 <= t - s < left.shape[1]:
                matrix[:, t, s] = left[:, t - s]
            elif right is not None and 0 <= s - t - 1 < right.shape[1]:
                matrix[:, t, s] = right[:, s - t - 1]
    return matrix


def applied(matrix, u):
    return np.einsum("hts,sh->th", matrix, u)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_sgconv(bidirectional):
    config = SGConvConfig(length=12, scale_size=3, decay=1.5, bidirectional=bidirectional)
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    assert p["kernel"].shape == (1 + bidirectional, 3, WIDTH, 3)
    filters = []
    for pieces, norm in zip(p["kernel"], p["kernel_norm"], strict=True):
        whole = np.concatenate([
            1.5**2 * pieces[0], 1.5 * pieces[1], np.stack([stretch(row) for row in pieces[2]])
        ], axis=1)  # fmt: skip
        filters.append(whole / norm[:, None])
    matrix = toeplitz(*filters)
    for x, y in zip(inputs, outputs, strict=True):
        oracles.assert_close(y, applied(matrix, x) + p["D"] * x)


def stretch(row):
    """Twice as many points, linearly in between, the ends held."""
    places = np.clip((np.arange(2 * len(row)) + 0.5) / 2 - 0.5, 0, len(row) - 1)
    return np.interp(places, np.arange(len(row)), row)


def test_the_filter_of_sgconv_begins_with_norm_one_that_no_gradient_changes():
    mixer = build(SGConvConfig(length=16, scale_size=4), WIDTH)
    impulse = jnp.zeros((1, 16, WIDTH)).at[0, 0].set(1.0)
    params = jax.jit(mixer.init)(jax.random.key(0), impulse)["params"]
    filters = jax.jit(mixer.apply)({"params": params | {"D": jnp.zeros(WIDTH)}}, impulse)[0][0]
    np.testing.assert_allclose(
        np.linalg.norm(filters, axis=0), 1, **tolerances.EACH_FLOAT32_NEAR_ONE
    )
    total = lambda p: jnp.sum(mixer.apply({"params": p}, impulse)[0] ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(total))(params)
    assert not np.any(gradient["kernel_norm"])
    assert np.any(gradient["kernel"] != 0)


def implicit(p, name, config, filters):
    """The taps of an implicit filter, distance by distance."""
    count = (config.filter_embedding - 1) // 2
    frequencies = np.linspace(1e-4, count - 1, count)
    decays = np.linspace(np.log(0.01) / 1.5, np.log(0.01) / 0.3, filters)
    taps = []
    for j in range(config.length):
        t = j / (config.length - 1)
        angle = 2 * np.pi * j / config.length * frequencies
        z = np.concatenate([[t], np.cos(angle), -np.sin(angle)])
        for layer in range(config.filter_layers):
            z = z @ p[f"{name}/dense_{layer}/kernel"] + p[f"{name}/dense_{layer}/bias"]
            z = np.sin(p[f"{name}/frequency"] * z)
        taps.append(z @ p[f"{name}/dense_{config.filter_layers}/kernel"] * np.exp(t * decays))
    return np.stack(taps, axis=1)


@pytest.mark.parametrize("order", [2, 3])
def test_hyena(order):
    config = HyenaConfig(
        length=10, filter_embedding=5, filter_width=6, filter_layers=2, order=order,
        filter_frequency=2.0,
    )  # fmt: skip
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    filters = np.split(implicit(p, "filter", config, (order - 1) * WIDTH), order - 1)
    for x, y in zip(inputs, outputs, strict=True):
        parts = x @ p["in_proj/kernel"] + p["in_proj/bias"]
        parts = oracles.causal_conv(parts, p["conv/kernel"], p["conv/bias"])
        v, *gates = np.split(parts, order + 1, axis=1)
        for i in reversed(range(1, order)):
            v = v * gates[i]
            v = applied(toeplitz(filters[i - 1]), v) + p["bias"][i - 1] * v
        expected = (v * gates[0]) @ p["out_proj/kernel"] + p["out_proj/bias"]
        oracles.assert_close(y, expected)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_monarch(bidirectional):
    config = MonarchConfig(
        length=9,
        filter_width=6,
        filter_layers=1,
        filter_frequency=2.0,
        bidirectional=bidirectional,
    )
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    ways = 1 + bidirectional
    matrices = {
        name: toeplitz(*np.split(implicit(p, name, config, ways * WIDTH), ways))
        for name in ("filter", "residual_filter")
    }
    for x, y in zip(inputs, outputs, strict=True):
        parts = x @ p["in_proj/kernel"] + p["in_proj/bias"]
        parts = oracles.causal_conv(parts, p["conv/kernel"], p["conv/bias"])
        first, second, v = np.split(parts, 3, axis=1)
        u = first * v
        y2 = second * (applied(matrices["filter"], u) + p["filter_bias"] * u)
        y2 = y2 + applied(matrices["residual_filter"], x) + p["residual_filter_bias"] * x
        oracles.assert_close(y, y2 @ p["out_proj/kernel"] + p["out_proj/bias"])


def test_a_monarch_matrix_is_the_product_of_its_factors():
    size, blocks, features = 12, 3, 18
    dense = MonarchDense(features, blocks)
    x = jax.random.normal(jax.random.key(1), (5, size))
    params = dense.init(jax.random.key(0), x)["params"]
    params["left"]["bias"] = jax.random.normal(jax.random.key(2), (features,))

    def diagonal(kernel):
        rows, columns = kernel.shape[1:]
        matrix = np.zeros((blocks * rows, blocks * columns))
        for i, block in enumerate(kernel):
            matrix[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = block
        return matrix

    def transposition(rows, columns):
        matrix = np.zeros((rows * columns,) * 2)
        for i in range(rows):
            for j in range(columns):
                matrix[i * columns + j, j * rows + i] = 1
        return matrix

    right, left = (np.asarray(params[name]["kernel"], np.float64) for name in ("right", "left"))
    middle = diagonal(right) @ transposition(size // blocks, blocks) @ diagonal(left)
    last = transposition(blocks, features // blocks)
    expected = (np.asarray(x) @ middle + np.asarray(params["left"]["bias"])) @ last
    testing.assert_close(dense.apply({"params": params}, x), expected, tolerances.FLOAT32)
    seen = np.abs(middle @ last) > 0
    assert seen.all()
    with pytest.raises(ValueError, match="5 blocks must divide 12 channels"):
        MonarchDense(10, 5).init(jax.random.key(0), x)


def test_orchid():
    p, inputs, outputs = oracles.initialised(OrchidConfig(conv_size=3), WIDTH, LENGTH)
    place = np.arange(LENGTH)
    for x, y in zip(inputs, outputs, strict=True):
        v, before, after = np.split(x @ p["in_proj/kernel"], 3, axis=1)
        q, k = (
            sum(p[name][:, j] * x[(place - j + 1) % LENGTH] for j in range(3))
            for name in ("q_taps", "k_taps")
        )
        h = np.stack([np.sum(k * q[(place + j) % LENGTH], axis=0) for j in range(LENGTH)])
        u = before * v
        matrix = (h / LENGTH)[(place[:, None] - place[None]) % LENGTH]
        y2 = np.einsum("tsh,sh->th", matrix, u) + p["D"] * u
        oracles.assert_close(y, (after * y2) @ p["out_proj/kernel"])


def test_orchid_turns_with_its_row():
    mixer = build(OrchidConfig(), WIDTH)
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH))
    variables, run = jax.jit(mixer.init)(jax.random.key(0), x), jax.jit(mixer.apply)
    y, _ = run(variables, x)
    for steps in (1, 5):
        z, _ = run(variables, jnp.roll(x, steps, axis=1))
        testing.assert_close(z, jnp.roll(y, steps, axis=1), tolerances.FLOAT32)
    ids = jnp.asarray([[1] * 9 + [0] * 4, [1] * LENGTH])
    padded, _ = run(variables, x, segments=Segments.from_ids(ids, single=True))
    alone, _ = run(variables, x[:1, :9])
    testing.assert_close(padded[:1, :9], alone, tolerances.FLOAT32)
    testing.assert_close(padded[1], y[1], tolerances.FLOAT32)


def test_published_size():
    """Hyena's language model: two maps of width 864, and the filter."""
    width, hidden = 864, 64
    maps = 4 * width * (width + 1) + 3 * width * 4
    mlp = hidden * 34 + 2 * hidden * (hidden + 1) + hidden * width + hidden
    assert oracles.count(HYENA_153M.config, width) == maps + mlp + width


def test_bad_configs_are_refused():
    for build_config, message in (
        (lambda: HyenaConfig(filter_embedding=4), "filter_embedding=4 must be an odd number"),
        (lambda: HyenaConfig(order=1), "order=1 must be at least 2"),
        (lambda: OrchidConfig(conv_size=4), "conv_size=4 must be odd"),
    ):
        with pytest.raises(ValueError, match=message):
            build_config()
