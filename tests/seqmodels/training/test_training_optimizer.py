"""Each parameter's effective learning rate and decay; schedules; clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmodels.mixers.base import ParamLabel
from seqmodels.training.config import TrainConfig
from seqmodels.training.optimizer import make_optimizer, schedule
from tests import tolerances

LABELS = {
    "kernel": ParamLabel(),
    "bias": ParamLabel(weight_decay=False),
    "Lambda": ParamLabel(group="ssm", weight_decay=False),
    "B": ParamLabel(group="ssm", weight_decay=True),
}
CONFIG = TrainConfig(
    steps=10,
    schedule="constant",
    learning_rate=0.1,
    group_learning_rates={"ssm": 0.01},
    weight_decay=0.5,
)


def first_update(config, param_labels=LABELS, gradient=3.0):
    params = {name: jnp.full((2,), 2.0) for name in param_labels}
    optimizer = make_optimizer(config, param_labels)
    grads = jax.tree.map(lambda p: jnp.full_like(p, gradient), params)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_rate_and_decay_of_each_parameter():
    # Adam's first update is the gradient's sign; decay adds 0.5 * 2.
    updates = first_update(CONFIG)
    expected = {"kernel": -0.1 * (1 + 1), "bias": -0.1, "Lambda": -0.01, "B": -0.01 * (1 + 1)}
    for name, value in expected.items():
        np.testing.assert_allclose(updates[name], value, **tolerances.EACH_FLOAT32_SUM)


def test_a_group_without_its_own_rate_takes_the_main_one():
    updates = first_update(TrainConfig(steps=10, schedule="constant", learning_rate=0.1))
    np.testing.assert_allclose(updates["Lambda"], -0.1, **tolerances.EACH_FLOAT32_SUM)


def test_groups_equal_separate_adam_and_adamw():
    params = {name: jnp.asarray([1.0, -2.0]) for name in LABELS}
    optimizer = make_optimizer(CONFIG, LABELS)
    reference = {}
    for name, label in LABELS.items():
        rate = 0.01 if label.group == "ssm" else 0.1
        decayed = optax.adamw(rate, weight_decay=0.5)
        reference[name] = decayed if label.weight_decay else optax.adam(rate)
    state = optimizer.init(params)
    states = {name: tx.init(params[name]) for name, tx in reference.items()}
    expected = dict(params)
    for step in range(4):
        grads = {name: jnp.sin(p + step) for name, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, tx in reference.items():
            update, states[name] = tx.update(grads[name], states[name], expected[name])
            expected[name] = optax.apply_updates(expected[name], update)
    for name in LABELS:
        np.testing.assert_allclose(params[name], expected[name], **tolerances.EACH_FLOAT32_SUM)


def test_unknown_group_names_the_known_ones():
    config = TrainConfig(group_learning_rates={"smm": 1.0})
    with pytest.raises(ValueError, match=r"'smm'.*'main', 'ssm'"):
        make_optimizer(config, LABELS)


def test_clipping_bounds_the_global_norm():
    # With eps far above the moments, Adam's first update is the clipped gradient over eps.
    config = TrainConfig(
        steps=10, schedule="constant", learning_rate=1.0, clip_norm=1e-3, adam_eps=1e3
    )
    norm = optax.tree.norm(first_update(config)) * 1e3
    np.testing.assert_allclose(norm, 1e-3, **tolerances.EACH_FLOAT32_TOTAL)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("rsqrt", [0.5, 1.0, 1.0, (2 / 7) ** 0.5, (2 / 12) ** 0.5]),
    ],
)
def test_schedules(kind, expected):
    config = TrainConfig(steps=12, warmup_steps=2, schedule=kind, min_lr=0.1)
    rate = schedule(config, 1.0)
    np.testing.assert_allclose(
        [rate(n) for n in (0, 1, 2, 7, 12)], expected, **tolerances.EACH_FLOAT32_SUM
    )


def test_cosine_is_a_cosine():
    rate = schedule(TrainConfig(steps=8, schedule="cosine"), 2.0)
    np.testing.assert_allclose(rate(2), 1 + np.cos(np.pi / 4), **tolerances.EACH_FLOAT32_TERMS)
