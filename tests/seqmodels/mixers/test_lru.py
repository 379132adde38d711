"""LRU against token-by-token NumPy in complex128; its initialisation and sizes."""

import numpy as np
import pytest

from seqmodels.mixers.lru import LRU_LRA, LRUConfig
from tests import tolerances
from tests.seqmodels.mixers.oracles import assert_close, count, fresh, initialised

WIDTH, LENGTH, STATES = 4, 9, 3


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrence(bidirectional):
    config = LRUConfig(STATES, 0.3, 0.9, bidirectional=bidirectional)
    p, x, y = initialised(config, WIDTH, LENGTH)
    eigenvalues = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    into = np.exp(p["gamma_log"])[:, None] * (p["B_re"] + 1j * p["B_im"])
    c = p["C_re"] + 1j * p["C_im"]
    for u, out in zip(x, y, strict=True):
        expected = u * p["D"]
        h = np.zeros(STATES, complex)
        for t in range(LENGTH):
            h = eigenvalues * h + into @ u[t]
            expected[t] += (c[:, :STATES] @ h).real
        if bidirectional:
            h = np.zeros(STATES, complex)
            for t in reversed(range(LENGTH)):
                h = eigenvalues * h + into @ u[t]
                expected[t] += (c[:, STATES:] @ h).real
        assert_close(out, expected)


def test_initialisation():
    p = fresh(LRUConfig(4096, 0.5, 0.9, max_phase=0.3), 8)
    radius, phase = np.exp(-np.exp(p["nu_log"])), np.exp(p["theta_log"])
    assert 0.5 <= radius.min() < 0.51
    assert 0.89 < radius.max() <= 0.9
    np.testing.assert_allclose(np.mean(radius**2), (0.25 + 0.81) / 2, rtol=0.02)
    assert 0.29 < phase.max() <= 0.3
    np.testing.assert_allclose(np.mean(phase), 0.15, rtol=0.05)
    np.testing.assert_allclose(
        np.exp(2 * p["gamma_log"]), 1 - radius**2, **tolerances.EACH_FLOAT32_TOTAL
    )
    for name, variance in [("B_re", 1 / 16), ("B_im", 1 / 16), ("C_re", 1 / 4096)]:
        np.testing.assert_allclose(np.mean(p[name] ** 2), variance, rtol=0.05)


def test_marks():
    labels = LRUConfig().param_labels()
    system = {"nu_log", "theta_log", "gamma_log", "B_re", "B_im"}
    assert {n for n, m in labels.items() if m.group == "ssm" and not m.weight_decay} == system
    assert {n for n, m in labels.items() if m.group == "main" and m.weight_decay} == {
        "C_re",
        "C_im",
        "D",
    }
    assert all(label.float32 for label in labels.values())


@pytest.mark.parametrize(
    ("task", "parameters"),
    [("cifar", 1_181_312), ("listops", 197_504), ("imdb", 295_744), ("pathfinder", 295_872)],
)
def test_published_sizes(task, parameters):
    size = LRU_LRA[task]  # 3 N + 2 N H + 4 N H + H
    assert size.layers == 6
    assert count(size.config, size.width) == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_size": 0}, "state_size=0 must be positive"),
        ({"r_min": 0.9, "r_max": 0.8}, "0 <= r_min < r_max <= 1, got r_min=0.9"),
        ({"max_phase": 7.0}, "max_phase=7.0 must be in"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LRUConfig(**change)
