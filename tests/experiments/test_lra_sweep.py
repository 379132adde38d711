"""Time budgets, and sweeps of many runs, on a tiny ListOps."""

import dataclasses
import json
import shlex

import jax
import pytest

from experiments.command_line import UsageError, as_options, changed, parse
from experiments.lra import budget, sweep, train
from experiments.lra import command as lra_command
from experiments.lra.budget import Budget
from experiments.lra.command import command_of
from experiments.lra.presets import experiment
from experiments.lra.train import resolve
from tests.experiments.test_lra_train import TINY
from tests.seqmodels.training.compilation import compiled_once


def tiny(task, model, preset, seed=0):
    return changed(experiment(task, model, preset, seed), as_options(TINY))


@pytest.fixture(scope="module", autouse=True)
def _setting(tmp_path_factory):
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        for module in (sweep, train, lra_command):
            patch.setattr(module, "experiment", tiny)
        patch.setattr(budget, "_PATIENCE", 1e4)  # the budget ends before the first compilation
        with compiled_once(tmp_path_factory.mktemp("compiled")):
            yield


def command(folder, *more):
    return [
        "--cells", "listops:s5", "--minutes", "0.01", "--no-progress",
        "--runs-dir", str(folder / "runs"), "--cache-dir", str(folder / "cache"),
        "--results-dir", str(folder / "results"), *more,
    ]  # fmt: skip


NAME = "listops-s5-cpu-0.01min-seed0"


class Killed(BaseException):
    """As good as kill -9: nothing behind it runs."""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep that was killed before its only cell had a result, and begun again."""
    folder, said = tmp_path_factory.mktemp("sweep"), {}

    def killed(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_checkpoint", killed)
        with pytest.raises(Killed):
            sweep.main(command(folder))
    said["begun"] = json.loads((folder / "runs" / NAME / "config.json").read_text())
    said["codes"] = [sweep.main(command(folder)), sweep.main(command(folder))]
    return folder, said


@pytest.mark.full
def test_a_killed_sweep_goes_on_with_the_steps_that_were_chosen(swept):
    folder, said = swept
    assert said["codes"] == [0, 0]
    result = json.loads((folder / "results" / f"{NAME}.json").read_text())
    assert result["starts"] == 2  # and the third sweep has left it out
    assert result["config"] == said["begun"]
    assert result["complete"]
    chosen = result["budget"]
    assert chosen["minutes"] == result["config"]["minutes"] == 0.01
    assert chosen["steps"] == result["steps"] == result["config"]["train"]["steps"] == 5
    assert 0 < chosen["seconds_per_step"] < 60
    assert result["config"]["train"]["max_minutes"] == 100.0


@pytest.mark.full
def test_its_command_gives_the_same_experiment(swept):
    folder, _ = swept
    result = json.loads((folder / "results" / f"{NAME}.json").read_text())
    _, _, module, *words = shlex.split(result["command"])
    assert module == "experiments.lra.train"
    arguments, fields = parse(train.Arguments, words, prog=train.PROG)
    config, _ = resolve(arguments, fields)
    assert json.loads(json.dumps(dataclasses.asdict(config.train))) == result["config"]["train"]
    assert config.name == NAME


@pytest.mark.full
def test_a_dry_run_lists_the_cells_in_their_order(swept, capsys):
    folder, _ = swept
    more = ("--dry-run", "--cells", "listops:s5:cpu:3", "listops:s5")
    assert sweep.main(command(folder, *more)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "[1/2] listops-s5-cpu-0.01min-seed3: to do"
    assert second.startswith(f"[2/2] {NAME}: test accuracy ")


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(train, "main", lambda words: asked.append(words) or 3)
    more = ("--cells", "listops:s5", "listops:s5:cpu:1")
    assert sweep.main(command(tmp_path, *more)) == 1
    assert [words[3] for words in asked] == ["--seed=0", "--seed=1"]
    assert "2 of 2 cells have failed: listops-s5" in capsys.readouterr().err


@pytest.mark.parametrize("code", [130, 143])
def test_a_signal_stops_the_sweep(code, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(train, "main", lambda words: asked.append(words) or code)
    more = ("--cells", "listops:s5", "listops:s5:cpu:1")
    assert sweep.main(command(tmp_path, *more)) == code
    assert len(asked) == 1
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cells", "listops"], "--cells listops must look like listops:s5"),
        (["--cells", "listops:s5:cpu:x"], "must look like"),
        (["--cells", "listops:s5", "listops:s5:cpu:0"], "it is there twice"),
        (["--cells", "lstops:s5"], "task='lstops' is not known"),
        (["--data", "text"], "--data text must look like text=PATH"),
        (["--minutes", "0"], "minutes=0.0 must be positive"),
    ],
)
def test_a_wrong_sweep_is_refused_before_it_begins(more, message, tmp_path, capsys):
    assert sweep.main(command(tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_the_plan_of_a_budget(monkeypatch):
    monkeypatch.setattr(budget, "_PATIENCE", 1.5)
    config = experiment("listops", "s5", "cpu")
    found = budget.planned(config, Budget(10.0, 1_000, 0.5, 30.0)).train
    assert (found.steps, found.warmup_steps, found.eval_every) == (1_000, 100, 200)
    assert found.checkpoint_every == 120  # a minute
    assert found.max_minutes == 15.0
    slow = budget.planned(config, Budget(1.0, 5, 100.0, 30.0)).train
    assert (slow.eval_every, slow.checkpoint_every, slow.log_every) == (1, 1, 1)


@pytest.mark.parametrize(
    ("task", "model", "preset", "settings"),
    [
        ("text", "gla", "cpu", ["train.learning_rate=0.5", "lengths=[600, 1024]"]),
        ("image", "transformer", "paper", ["data.allow_partial=true", "train.clip_norm=2"]),
        ("mnist", "s4d", "cpu-hour", ["classifier.backbone.mixers.0.n_ssm=null"]),
        ("pathfinder", "scout", "gpu-15min", ["classifier.backbone.mixers.0.local.expand=2"]),
    ],
)
def test_any_experiment_has_a_command(task, model, preset, settings, monkeypatch):
    for module in (train, lra_command):
        monkeypatch.setattr(module, "experiment", experiment)
    config = changed(experiment(task, model, preset, 7), as_options(settings))
    *_, text = command_of(config, with_data=True).partition("experiments.lra.train ")
    arguments, fields = parse(train.Arguments, shlex.split(text), prog=train.PROG)
    assert resolve(arguments, fields)[0] == config
    assert str(arguments.data_dir) == "DATA_DIR"


def test_unknown_cells_are_usage_errors():
    with pytest.raises(UsageError):
        sweep.cells(sweep.Arguments(cells=("listops:s5:nothing",)))
