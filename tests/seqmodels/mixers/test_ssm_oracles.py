"""S5 and S4D against token-by-token NumPy in complex128; their initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers import S4DConfig, S5Config, build, hippo
from seqmodels.mixers.s4d import initial_system
from tests import tolerances
from tests.tiers import one_of_many

WIDTH, LENGTH = 4, 9


def initialised(config, seed=0, width=WIDTH):
    mixer = build(config, width)
    x = jax.random.normal(jax.random.key(seed + 1), (2, LENGTH, width))
    variables = jax.jit(mixer.init)(jax.random.key(seed), x)
    params = {name: np.asarray(p, np.float64) for name, p in variables["params"].items()}
    y, _ = jax.jit(mixer.apply)(variables, x)
    return params, np.asarray(x, np.float64), np.asarray(y)


def pairs(parameter):
    return parameter[..., 0] + 1j * parameter[..., 1]


def recur(decay, drive):
    """``h_t = decay h_{t-1} + drive_t`` over the first axis of ``drive``."""
    h, out = np.zeros_like(drive[0]), []
    for part in drive:
        h = decay * h + part
        out.append(h)
    return np.stack(out)


def rule(eigenvalues, step, name):
    z = eigenvalues * step
    if name == "zoh":
        return np.exp(z), (np.exp(z) - 1) / eigenvalues
    return (1 + z / 2) / (1 - z / 2), step / (1 - z / 2)


def assert_close(actual, expected):
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    assert error < tolerances.FLOAT32_TERMS


@pytest.mark.always("options1-True", "options0-False", "options2-False")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"c_init": "lecun_normal"},
        {"c_init": "trunc_standard_normal", "discretization": "bilinear", "clip_eigs": True},
        {"c_init": "complex_normal", "step_rescale": 2.0},
    ],
)
def test_s5(options, bidirectional):
    config = S5Config(state_size=8, blocks=2, bidirectional=bidirectional, **options)
    p, x, y = initialised(config)
    eigenvalues = p["Lambda_re"] + 1j * p["Lambda_im"]
    step = config.step_rescale * np.exp(p["log_step"])
    decay, gain = rule(eigenvalues, step, config.discretization)
    into = gain[:, None] * pairs(p["B"])
    for u, out in zip(x, y, strict=True):
        drive = u @ into.T
        expected = u * p["D"]
        expected += 2 * (recur(decay, drive) @ pairs(p["C1" if bidirectional else "C"]).T).real
        if bidirectional:
            expected += 2 * (recur(decay, drive[::-1])[::-1] @ pairs(p["C2"]).T).real
        assert_close(out, expected)


@pytest.mark.always("options3-True", "options1-True")
@pytest.mark.parametrize("bidirectional", one_of_many([False, True], [True]))
@pytest.mark.parametrize(
    "options",
    [
        {"init": "lin"},
        {"init": "legs", "discretization": "bilinear", "n_ssm": 2},
        {"init": "inv", "n_ssm": 1},
        {"init": "real"},
    ],
)
def test_s4d(options, bidirectional):
    config = S4DConfig(state_size=6, bidirectional=bidirectional, dt_min=0.01, **options)
    p, x, y = initialised(config)
    for channel in range(WIDTH):
        copy = channel % (config.n_ssm or WIDTH)
        eigenvalues = -np.exp(p["log_A_real"][copy]) + 1j * p["A_imag"][copy]
        decay, gain = rule(eigenvalues, np.exp(p["log_dt"][channel]), config.discretization)
        drive = x[:, :, channel].T[..., None] * (gain * pairs(p["B"])[copy])
        left = pairs(p["C1" if bidirectional else "C"])[channel]
        expected = x[:, :, channel].T * p["D"][channel] + 2 * (recur(decay, drive) @ left).real
        if bidirectional:  # the kernel from the right starts at the next token
            right = 2 * (recur(decay, drive[::-1])[::-1] @ pairs(p["C2"])[channel]).real
            expected[:-1] += right[1:]
        assert_close(y[:, :, channel].T, expected)


@pytest.mark.parametrize("size", [2, 4, 64])
def test_hippo_eigenvectors_diagonalise_the_normal_part(size):
    n = np.arange(size)
    lower = np.sqrt((2 * n[:, None] + 1) * (2 * n[None] + 1))
    legs = np.where(n[:, None] > n[None], -lower, np.diag(-(n + 1.0)))
    p = np.sqrt(n + 0.5)
    values, vectors = hippo.normal_eigen(size)
    assert np.all(values.imag < 0)
    assert np.all(np.diff(values.imag) > 0)
    np.testing.assert_allclose(values.real, -0.5, **tolerances.EACH_FLOAT64_BASIS)
    np.testing.assert_allclose(
        vectors.conj().T @ vectors, np.eye(size // 2), **tolerances.EACH_FLOAT64_BASIS
    )
    np.testing.assert_allclose(vectors[0].imag, 0, **tolerances.EACH_FLOAT64_BASIS)
    assert np.all(vectors[0].real > 0)
    both = np.concatenate([vectors, vectors.conj()], axis=1)
    spectrum = np.concatenate([values, values.conj()])
    rebuilt = both @ np.diag(spectrum) @ both.conj().T
    np.testing.assert_allclose(rebuilt, legs + np.outer(p, p), **tolerances.EACH_FLOAT64_REBUILT)


def test_hippo_blocks_and_clipped_input():
    values, vectors = hippo.blocked_eigen(12, 3)
    one, small = hippo.normal_eigen(4)
    np.testing.assert_array_equal(values, np.concatenate([one] * 3))
    assert vectors.shape == (12, 6)
    np.testing.assert_array_equal(vectors[4:8, 2:4], small)
    assert not np.any(vectors[4:8, [0, 1, 4, 5]])
    _, vectors = hippo.normal_eigen(64)
    exact = vectors.conj().T @ np.sqrt(2 * np.arange(64) + 1.0)
    assert np.abs(exact.imag).max() > 40  # what S4 clips
    clipped = hippo.normal_input(vectors)
    assert np.abs(clipped.imag).max() == 2
    np.testing.assert_array_equal(clipped.real, exact.real)
    with pytest.raises(ValueError, match="size=3 must be an even number"):
        hippo.normal_eigen(3)


def test_s4d_eigenvalues():
    np.testing.assert_allclose(initial_system("lin", 6)[0], -0.5 + 1j * np.pi * np.arange(3))
    inverse = 6 / np.pi * (6 / (2 * np.arange(3) + 1) - 1)
    np.testing.assert_allclose(initial_system("inv", 6)[0], -0.5 + 1j * inverse)
    np.testing.assert_allclose(initial_system("real", 6)[0], [-1, -2, -3])


@pytest.mark.parametrize("c_init", ["lecun_normal", "trunc_standard_normal", "complex_normal"])
def test_s5_initial_scales(c_init):
    size, width = 64, 128
    config = S5Config(state_size=size, blocks=4, c_init=c_init, dt_min=1e-3, dt_max=1e-1)
    mixer = build(config, width)
    p = jax.jit(mixer.init)(jax.random.key(0), jnp.zeros((1, 2, width)))["params"]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(p))
    step = np.exp(p["log_step"])
    assert 1e-3 <= step.min() < 3e-3
    assert 3e-2 < step.max() <= 1e-1
    # Unitary changes of basis keep the sum of squares of B; half of the modes are kept.
    np.testing.assert_allclose(np.mean(np.sum(p["B"] ** 2, -1)), 1 / size, rtol=0.1)
    variance = {
        "lecun_normal": 2 / (size * width),
        "trunc_standard_normal": 2 / size,
        "complex_normal": 1.0,
    }[c_init]
    np.testing.assert_allclose(np.mean(np.sum(p["C"] ** 2, -1)), variance, rtol=0.1)
    np.testing.assert_allclose(np.std(p["D"]), 1, rtol=0.2)


@pytest.mark.parametrize(
    ("decay", "b", "c"),
    [
        ("standard", ("ssm", False), ("main", True)),
        ("BandCdecay", ("ssm", True), ("main", True)),
        ("BfastandCdecay", ("main", True), ("main", True)),
        ("noBCdecay", ("ssm", False), ("ssm", False)),
    ],
)
def test_s5_marks(decay, b, c):
    labels = S5Config(decay=decay, bidirectional=True).param_labels()
    short = {name: (label.group, label.weight_decay) for name, label in labels.items()}
    system = dict.fromkeys(("Lambda_re", "Lambda_im", "log_step"), ("ssm", False))
    assert short == system | {"B": b, "C1": c, "C2": c, "D": c}
    assert all(label.float32 for label in labels.values())
    assert S5Config(dt_global=True).param_labels()["log_step"].group == "main"


def test_s4d_marks():
    labels = S4DConfig().param_labels()
    assert {n for n, m in labels.items() if m.group == "ssm"} == {
        "log_dt",
        "log_A_real",
        "A_imag",
        "B",
    }
    assert {n for n, m in labels.items() if m.weight_decay} == {"C", "D"}
    other = S4DConfig(dt_global=True, c_ssm=True).param_labels()
    assert (other["log_dt"].group, other["log_dt"].weight_decay) == ("main", False)
    assert (other["C"].group, other["C"].weight_decay) == ("ssm", True)
