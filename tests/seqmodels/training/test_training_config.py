"""Validation of the config."""

import pytest

from seqmodels.training.config import TrainConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("accumulate", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -1.0),
        ("warmup_steps", 1001),
        ("schedule", "sine"),
        ("min_lr", -1.0),
        ("clip_norm", 0.0),
        ("adam_b1", 1.0),
        ("adam_eps", 0.0),
        ("log_every", 0),
        ("keep", 0),
        ("on_nan", "ignore"),
        ("max_minutes", 0.0),
        ("group_learning_rates", {"ssm": -1.0}),
    ],
)
def test_bad_values_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})


def test_micro_batches_divide_the_batch():
    with pytest.raises(ValueError, match="accumulate=3 must divide batch_size=32"):
        TrainConfig(accumulate=3)
