"""Validation of the config."""

import dataclasses

import pytest

from seqmodels.config import from_dict
from seqmodels.training.checkpoint import differences
from seqmodels.training.config import RESUMABLE, TrainConfig


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
        ("select", "best"),
        ("seed", 2**32),
        ("mesh", {"data": 0}),
    ],
)
def test_bad_values_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        from_dict(TrainConfig, {field: value})


def test_what_a_mesh_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"linear_scan cannot take 'ring'; choose among all_gather"
    ):
        from_dict(TrainConfig, {"mesh": {"exchange": {"linear_scan": "ring"}}})


def test_micro_batches_divide_the_batch():
    with pytest.raises(ValueError, match="accumulate=3 must divide batch_size=32"):
        TrainConfig(accumulate=3)


def test_what_may_change_on_resuming_is_known_by_its_whole_path():
    """Not by the last part of it, which another field may share."""
    fields = {f"train.{field.name}" for field in dataclasses.fields(TrainConfig)}
    assert fields >= {path for path in RESUMABLE if path.startswith("train.")}
    saved = {"train": {"keep": 2}, "model": {"keep": 2}, "keep": 2}
    wanted = {"train": {"keep": 3}, "model": {"keep": 3}, "keep": 3}
    assert differences(saved, wanted) == ["keep=3 (saved: 2)", "model.keep=3 (saved: 2)"]


def test_a_run_may_go_on_on_another_mesh():
    saved = {"train": {"mesh": {"seq": 4, "exchange": {"linear_attention": "chain"}}}}
    wanted = {"train": {"mesh": {"seq": 2, "exchange": {}}, "meshes": 1}}
    assert differences(saved, wanted) == ["train.meshes=1 (saved: None)"]
