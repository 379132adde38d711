"""S4D-FT and B2S6 against token-by-token NumPy in float64: values, and gradients by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers import MambaConfig, S4DConfig, Segments, build
from tests import tolerances
from tests.seqmodels.mixers.oracles import by_path, causal_conv, fresh, shapes, silu, softplus

LENGTH = 6


def apply(config, width, segments=None, seed=0):
    """Parameters by path and inputs as float64; outputs, and a gradient by parameter and of x."""
    mixer = build(config, width)
    x = jax.random.normal(jax.random.key(seed + 1), (2, LENGTH, width))
    variables = jax.jit(mixer.init)(jax.random.key(seed), x)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 2), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    variables = jax.tree.unflatten(tree, moved)
    cotangent = jax.random.normal(jax.random.key(seed + 3), x.shape)

    def total(variables, x):
        y, _ = mixer.apply(variables, x, segments=segments)
        return jnp.sum(y * cotangent), y

    (_, y), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(variables, x)
    gradients = by_path(grads[0]["params"]) | {"x": np.asarray(grads[1], np.float64)}
    values = by_path(variables["params"]) | {"x": np.asarray(x, np.float64)}
    return values, np.asarray(cotangent, np.float64), np.asarray(y), gradients


def assert_agrees(oracle, values, cotangent, y, gradients):
    """Outputs; and of each array the gradient along it and along a random direction."""
    expected = oracle(values)
    error = np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2))
    assert error < tolerances.FLOAT32
    rng, step = np.random.default_rng(0), 1e-5
    for name, gradient in gradients.items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, name
        for direction in (gradient / norm, rng.normal(size=gradient.shape) / gradient.size**0.5):
            sides = [
                np.sum(oracle(values | {name: values[name] + sign * step * direction}) * cotangent)
                for sign in (1, -1)
            ]
            difference = abs((sides[0] - sides[1]) / (2 * step) - np.sum(gradient * direction))
            assert difference < tolerances.FLOAT32_MIXER_GRADIENTS * norm, name


def s4d_ft(values):
    """The kernel tap by tap, and a convolution on a ring of 2 L, frequency by frequency."""
    x, length = values["x"], values["x"].shape[1]
    outputs = np.zeros_like(x)
    for channel in range(x.shape[2]):
        copy = channel % len(values["A_imag"])
        eigenvalues = -np.exp(values["log_A_real"][copy]) + 1j * values["A_imag"][copy]
        step = np.exp(values["log_dt"][channel])
        b = values["B"][copy] @ [1, 1j] * (np.exp(eigenvalues * step) - 1) / eigenvalues
        ring = np.zeros(2 * length)
        for j in range(length):
            taps = b * np.exp(eigenvalues * step * j)
            ring[j] = 2 * np.real(values["C1"][channel] @ [1, 1j] @ taps)
            ring[-1 - j] = 2 * np.real(values["C2"][channel] @ [1, 1j] @ taps)
        places = np.arange(2 * length)
        waves = np.exp(-2j * np.pi * np.outer(places, places) / (2 * length))
        cycles = np.minimum(places, 2 * length - places) / (2 * length)
        weight = (1 + cycles) ** values["frequency_weight"][channel]
        for row in range(len(x)):
            padded = np.concatenate([x[row, :, channel], np.zeros(length)])
            response = (waves @ padded) * (waves @ ring) * weight
            full = (waves.conj() @ response).real / (2 * length)
            skip = values["D"][channel] * x[row, :, channel]
            outputs[row, :, channel] = full[:length] + skip
    return outputs


@pytest.mark.full
def test_s4d_with_weighted_frequencies():
    config = S4DConfig(
        state_size=4, n_ssm=1, bidirectional=True, dt_min=0.05, dt_max=0.5,
        frequency_scale=3.0, frequency_weight=True,
    )  # fmt: skip
    assert_agrees(s4d_ft, *apply(config, 2))


def test_frequencies_begin_scaled_and_their_weights_at_one():
    p = fresh(S4DConfig(state_size=6, n_ssm=1, frequency_scale=3.0), 2)
    np.testing.assert_allclose(
        p["A_imag"], 3 * np.pi * np.arange(3)[None], **tolerances.EACH_FLOAT32_TERMS
    )
    config = S4DConfig(state_size=6, bidirectional=True, frequency_weight=True)
    assert not fresh(config, 2)["frequency_weight"].any()
    label = config.param_labels()["frequency_weight"]
    assert (label.group, label.weight_decay) == ("frequency", False)


@pytest.mark.full
def test_weights_of_one_change_nothing():
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 2))
    plain = S4DConfig(state_size=4, bidirectional=True)
    weighted = S4DConfig(state_size=4, bidirectional=True, frequency_weight=True)
    variables = jax.jit(build(weighted, 2).init)(jax.random.key(1), x)
    y, _ = jax.jit(build(weighted, 2).apply)(variables, x)
    del variables["params"]["frequency_weight"]
    expected, _ = jax.jit(build(plain, 2).apply)(variables, x)
    error = np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2))
    assert error < tolerances.FLOAT32_S4_KERNEL


def b2s6(values, *, blocks, states, lengths=(LENGTH, LENGTH)):
    """Token by token, channel by channel."""
    outputs = np.zeros_like(values["x"])
    kernel = values["blocks/x_proj"]
    width, rank = kernel.shape[1], values["blocks/dt_proj"].shape[1]
    for row, length in enumerate(lengths):
        u = values["x"][row, :length]
        inner, gate = np.split(u @ values["in_proj/kernel"], 2, axis=-1)
        inner = silu(causal_conv(inner, values["conv1d/kernel"], values["conv1d/bias"]))
        read = np.zeros_like(inner)
        for e in range(blocks * width):
            block = e // width
            a = -np.exp(values["blocks/A_log"][e]) + 1j * values["blocks/A_imag"][e]
            h = np.zeros(states, complex)
            for t in range(length):
                seen = inner[t, block * width : (block + 1) * width] @ kernel[block]
                delta = seen[:rank] @ values["blocks/dt_proj"][block][:, e % width]
                step = softplus(delta + values["blocks/dt_bias"][e])
                parts = seen[rank:].reshape(4, states)
                b = parts[0] + 1j * parts[1] + values["blocks/B_bias"][e] @ [1, 1j]
                h = np.exp(step * a) * h + step * inner[t, e] * b
                read[t, e] = np.real(np.sum((parts[2] + 1j * parts[3]) * h))
                read[t, e] += values["blocks/D"][e] * inner[t, e]
        outputs[row, :length] = (read * silu(gate)) @ values["out_proj/kernel"]
    return outputs


@pytest.mark.full  # the next test has all that this one has but for ranks
@pytest.mark.parametrize(("blocks", "rank"), [(2, 2), (1, None)])
def test_mamba_with_blocks(blocks, rank):
    config = MambaConfig(state_size=3, expand=2, conv_size=2, dt_rank=rank, blocks=blocks)

    def oracle(values):
        return b2s6(values, blocks=blocks, states=3)

    assert_agrees(oracle, *apply(config, 2))


@pytest.mark.full
def test_mamba_with_blocks_stops_at_padding():
    ids = np.array([[1] * LENGTH, [1] * 4 + [0] * 2], np.int32)
    config = MambaConfig(state_size=2, expand=1, conv_size=2, blocks=2)

    def oracle(values):
        return b2s6(values, blocks=2, states=2, lengths=(LENGTH, 4))

    segments = Segments.from_ids(jnp.asarray(ids), single=True)
    assert_agrees(oracle, *apply(config, 2, segments))


def test_blocks_begin_as_s4d_lin_does_and_have_their_own_rate():
    config = MambaConfig(state_size=4, blocks=2)
    p = fresh(config, 32)
    assert shapes(config, 32)["blocks/x_proj"] == (2, 32, 1 + 4 * 4)
    assert shapes(config, 32)["blocks/dt_proj"] == (2, 1, 32)
    np.testing.assert_allclose(
        -np.exp(p["blocks/A_log"]) + 1j * p["blocks/A_imag"],
        np.tile(-0.5 + 1j * np.pi * np.arange(4), (64, 1)),
        **tolerances.EACH_FLOAT32_TERMS,
    )
    np.testing.assert_array_equal(p["blocks/B_bias"], np.tile([1.0, 0.0], (64, 4, 1)))
    step = softplus(p["blocks/dt_bias"])
    assert 0.999e-3 <= step.min() < step.max() <= 0.1001
    labels = config.param_labels()
    assert set(labels) < set(p)
    ssm = {name for name, label in labels.items() if label.group == "ssm"}
    assert ssm == {f"blocks/{name}" for name in ("A_log", "A_imag", "dt_proj", "dt_bias")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S4DConfig(frequency_weight=True), "frequency_weight=True sees both sides"),
        (lambda: S4DConfig(frequency_scale=0.0), "frequency_scale=0.0 must be positive"),
        (lambda: MambaConfig(blocks=0), "blocks=0 must be positive"),
        (lambda: MambaConfig(blocks=2, mixer_rms_eps=1e-6), "one of them must be None"),
        (lambda: shapes(MambaConfig(blocks=3), 4), "blocks=3 must divide 8 channels"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
