"""Whole runs of the toy: resume after every kind of end, bad batches, errors, what is on disk."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from seqmodels.parallel.mesh import make_mesh
from seqmodels.training import processes
from seqmodels.training.checkpoint import Checkpoints
from seqmodels.training.errors import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    RunDirectoryError,
)
from seqmodels.training.loop import chain_digest
from seqmodels.training.metrics import TIMING_FIELDS, read_jsonl
from seqmodels.training.state import abstract_state
from tests import tolerances
from tests.seqmodels.training.compilation import compiled_once
from tests.seqmodels.training.toy import CONFIG, ToyBatches, run_toy, toy_task

# Compared bit for bit with runs of other processes.
pytestmark = pytest.mark.optimised

ROOT = Path(__file__).parents[3]


class Stopped(Exception):
    """A test's own fault."""


def fault(event, step):
    def on_event(what, at):
        if (what, at) == (event, step):
            raise Stopped

    return on_event


def metrics(run_dir):
    """Every field that must be reproduced."""
    return [
        {name: value for name, value in record.items() if name not in TIMING_FIELDS}
        for record in read_jsonl(run_dir / "metrics.jsonl")
    ]


def saved(run_dir, step=None, config=CONFIG):
    """A checkpoint's state, as numpy, and its data position."""
    config_dict = {"train": dataclasses.asdict(config)}
    template = abstract_state(toy_task(), config, make_mesh(devices=jax.devices()[:1]))
    with Checkpoints(run_dir / "checkpoints", config_dict, read_only=True) as checkpoints:
        state, position = checkpoints.restore(template, step or checkpoints.latest())
    state = state.replace(rng=jax.random.key_data(state.rng))
    return jax.tree.map(np.asarray, state), position["data"]


def assert_same_run(run_dir, reference):
    assert metrics(run_dir) == metrics(reference)
    (state, data), (expected, expected_data) = saved(run_dir), saved(reference)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert data == expected_data


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("unbroken")
    outcome = run_toy(run_dir)
    assert outcome.complete
    return run_dir


def test_what_a_run_leaves(unbroken):
    records = read_jsonl(unbroken / "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 3), ("eval", 5), ("train", 6), ("train", 9), ("eval", 10), ("train", 12),
        ("eval", 12),
    ]  # fmt: skip
    assert json.loads((unbroken / "config.json").read_text())["train"]["steps"] == 12
    (start,) = json.loads((unbroken / "environment.json").read_text())
    assert {"command", "commit", "dirty", "versions", "device"} <= start.keys()
    assert any((unbroken / "tensorboard").iterdir())


def test_tokens_and_order_are_those_of_the_data(unbroken):
    batches, tokens, order = iter(ToyBatches()), 0, ""
    for _ in range(12):
        batch = next(batches)
        tokens += int(batch["segment_ids"].sum())
        order = chain_digest(order, batch["index"].tolist())
    last = [r for r in read_jsonl(unbroken / "metrics.jsonl") if r["kind"] == "train"][-1]
    assert (last["tokens"], last["order"]) == (tokens, order)


def test_training_learns(tmp_path):
    config = dataclasses.replace(CONFIG, steps=60, eval_every=60, log_every=20)
    run_toy(tmp_path, config)
    train = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert train[-1]["loss"] < 0.8 * np.log(3)  # guessing has log(3)


def test_killed_while_saving_and_again_after_a_log(unbroken, tmp_path):
    """SIGKILL between writing and naming checkpoint 8; resumed from 5; SIGKILL again."""

    def start(*arguments):
        command = [sys.executable, "-m", "tests.seqmodels.training.toy", str(tmp_path)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr

    start("commit", "8")
    steps = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"4", "5"} <= steps
    assert "8" not in steps
    start("log", "9", "resume")
    run_toy(tmp_path, resume=True)
    assert_same_run(tmp_path, unbroken)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 3


@pytest.mark.always("save-8")
@pytest.mark.parametrize(("event", "step"), [("step", 2), ("save", 8), ("eval", 10)])
def test_a_fault_at_any_point_resumes_bitwise(unbroken, tmp_path, event, step):
    with pytest.raises(Stopped):
        run_toy(tmp_path, on_event=fault(event, step))
    run_toy(tmp_path, resume=True)
    assert_same_run(tmp_path, unbroken)


@pytest.mark.always("15")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_the_finished_step(unbroken, tmp_path, number):
    before = signal.getsignal(number)

    def on_event(what, step):
        if (what, step) == ("step", 6):
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="--resume") as caught:
        run_toy(tmp_path, on_event=on_event)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert saved(tmp_path)[0].step in (7, 8)
    run_toy(tmp_path, resume=True)
    assert_same_run(tmp_path, unbroken)


def test_resuming_a_finished_run_changes_nothing(unbroken):
    before = metrics(unbroken)
    outcome = run_toy(unbroken, resume=True)
    assert outcome.progress.step == 12
    assert metrics(unbroken) == before


def test_the_best_checkpoint_is_kept(unbroken):
    evaluations = [r for r in read_jsonl(unbroken / "metrics.jsonl") if r["kind"] == "eval"]
    best = max(evaluations, key=lambda record: record["accuracy"])["step"]
    assert best == 5  # so that the test tells it from the latest ones
    names = {int(path.name) for path in (unbroken / "checkpoints").iterdir()}
    assert best in names
    assert len(names) == 3


def test_the_best_checkpoint_survives_a_resume(tmp_path):
    config = dataclasses.replace(CONFIG, keep=1)
    with pytest.raises(Stopped):
        run_toy(tmp_path, config, on_event=fault("step", 9))
    outcome = run_toy(tmp_path, config, resume=True)
    assert outcome.chosen_step == 5
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"5", "12"}


def test_a_batch_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="step 7"):
        run_toy(tmp_path, poison=(7,))
    (record,) = read_jsonl(tmp_path / "nonfinite.jsonl")
    expected = ToyBatches()
    expected.set_state({"taken": 6})
    assert record["step"] == 7
    assert record["loss"] == "nan"
    assert record["data"] == {"taken": 6}
    assert record["index"] == next(expected)["index"].tolist()
    state, data = saved(tmp_path)
    assert (int(state.step), data) == (6, {"taken": 6})


def test_other_processes_than_the_first_stop_as_well_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with pytest.raises(NonFiniteError, match=r"step 2: .*nonfinite\.jsonl"):
        run_toy(tmp_path, poison=(2,))
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoints"}


@pytest.mark.full
def test_a_stopped_run_goes_on_without_the_batch(tmp_path):
    with pytest.raises(NonFiniteError):
        run_toy(tmp_path / "stopped", poison=(7,))
    skip = dataclasses.replace(CONFIG, on_nan="skip")
    run_toy(tmp_path / "stopped", skip, poison=(7,), resume=True)
    outcome = run_toy(tmp_path / "skipped", skip, poison=(7,))
    assert outcome.progress.skipped == 1
    assert_same_run(tmp_path / "stopped", tmp_path / "skipped")
    assert metrics(tmp_path / "skipped")[-2]["skipped"] == 1


def test_too_many_skips_stop_the_run(tmp_path):
    config = dataclasses.replace(CONFIG, on_nan="skip", max_skips=2)
    with pytest.raises(NonFiniteError, match="max_skips=2"):
        run_toy(tmp_path, config, poison=range(2, 9))


def test_a_new_run_does_not_touch_an_old_one(unbroken):
    with pytest.raises(RunDirectoryError, match=r"--resume.*--run-dir"):
        run_toy(unbroken)


def test_resuming_what_is_not_a_run(tmp_path):
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        run_toy(tmp_path, resume=True)


def test_resuming_with_another_config_names_the_fields(unbroken):
    config = dataclasses.replace(CONFIG, learning_rate=0.1, weight_decay=0.2, keep=5)
    with pytest.raises(RunDirectoryError) as caught:
        run_toy(unbroken, config, resume=True)
    assert "train.learning_rate=0.1 (saved: 0.05)" in str(caught.value)
    assert "train.weight_decay=0.2" in str(caught.value)
    assert "keep" not in str(caught.value)


def test_checkpoints_of_another_config_are_refused(unbroken):
    config = dataclasses.replace(CONFIG, seed=4)
    with pytest.raises(CheckpointError, match=r"train.seed=4 \(saved: 3\)"):
        saved(unbroken, config=config)


def test_a_missing_step_names_those_there_are(unbroken):
    with pytest.raises(CheckpointError, match=r"step 7.*5, 8, 12"):
        saved(unbroken, step=7)


def test_a_full_disk_while_saving(unbroken, tmp_path, monkeypatch):
    save = ocp.CheckpointManager.save

    def full(self, step, *args, **options):
        if step == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*intact") as caught:
            run_toy(tmp_path)
    assert caught.value.exit_code == 1
    assert saved(tmp_path)[0].step == 5
    run_toy(tmp_path, resume=True)
    assert_same_run(tmp_path, unbroken)


def test_a_failure_in_the_background_is_reported_at_the_next_log(tmp_path, monkeypatch):
    def fail(self):
        if 8 in self.all_steps():
            raise ValueError(f"RESOURCE_EXHAUSTED: {os.strerror(errno.ENOSPC)} and more\nlines")

    monkeypatch.setattr(ocp.CheckpointManager, "check_for_errors", fail)
    with pytest.raises(CheckpointError, match=r"\(No space left on device\)"):
        run_toy(tmp_path)
    assert [r["step"] for r in metrics(tmp_path)] == [3, 5, 6, 9]


def test_the_time_budget_ends_with_a_checkpoint(tmp_path):
    config = dataclasses.replace(CONFIG, max_minutes=1e-9)
    outcome = run_toy(tmp_path, config)
    assert not outcome.complete
    assert saved(tmp_path, config=config)[0].step == outcome.progress.step == 1


@pytest.mark.full
def test_eight_devices_have_the_same_data_order(unbroken, tmp_path):
    run_toy(tmp_path, mesh=make_mesh())
    ours, theirs = metrics(tmp_path), metrics(unbroken)
    assert [r.get("order") for r in ours] == [r.get("order") for r in theirs]
    losses = [[r["loss"] for r in records] for records in (ours, theirs)]
    np.testing.assert_allclose(*losses, **tolerances.EACH_FLOAT32_TOTAL)
