"""The commands, end to end, on a tiny ListOps."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from experiments.lra import eval as lra_eval
from experiments.lra import train as lra_train
from seqmodels.training.metrics import read_jsonl
from tests.seqmodels.data.lra import original_files as original
from tests.seqmodels.training.compilation import on_one_device

TINY = [
    "data.min_length=8", "data.max_length=24", "data.max_depth=4", "data.train=64",
    "data.validation=16", "data.test=20", "lengths=[24]", "train.batch_size=8",
    "train.warmup_steps=1", "train.eval_every=3", "train.log_every=2", "train.mesh.data=1",
    'classifier.backbone.layout=["s5"]', "classifier.backbone.width=8",
    "classifier.backbone.mixers.0.state_size=4", "classifier.backbone.mixers.0.blocks=1",
]  # fmt: skip


def command(folder, *more, steps=4):
    return [
        "--task", "listops", "--model", "s5", "--steps", str(steps), "--no-progress",
        "--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache"),
        "--results-dir", str(folder / "results"),
        *[word for setting in TINY for word in ("--set", setting)], *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _setting(tmp_path_factory):
    """One device is enough for the tiny batches, and one compilation for all runs."""
    with on_one_device(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lra")
    assert lra_train.main(command(folder)) == 0
    return folder


def result_of(folder, task="listops"):
    return json.loads((folder / "results" / f"{task}-s5-cpu-seed0.json").read_text())


@pytest.mark.full
@pytest.mark.parametrize(
    ("task", "files", "settings"),
    [
        ("mnist", original.mnist(24, 6), ["data.validation=8"]),
        pytest.param(
            "retrieval", original.pairs(24, 6, 6), ["data.max_length=12", "lengths=[12]"],
            marks=pytest.mark.full,
        ),
    ],
)  # fmt: skip
def test_real_inputs_and_pairs_are_trained_on_as_well(task, files, settings, tmp_path, capsys):
    folder = original.write(tmp_path / "data", files)
    options = [word for setting in settings for word in ("--set", setting)]
    tiny = [setting for setting in TINY if not setting.startswith(("data", "lengths"))]
    arguments = [
        "--task", task, "--model", "s5", "--steps", "3", "--no-progress", "--allow-partial",
        "--data-dir", str(folder), "--run-dir", str(tmp_path / "run"),
        "--cache-dir", str(tmp_path / "cache"), "--results-dir", str(tmp_path / "results"),
        *[word for setting in tiny for word in ("--set", setting)], *options,
    ]  # fmt: skip
    assert lra_train.main(arguments) == 0
    result = result_of(tmp_path, task)
    assert np.isfinite([record["loss"] for record in result["curve"]]).all()
    assert result["tokens"] > 0
    assert lra_eval.main(["--checkpoint", str(tmp_path / "run"), "--no-progress"]) == 0
    assert "equal to the recorded accuracy" in capsys.readouterr().out


def test_the_result_says_what_was_run(trained):
    result = result_of(trained)
    assert 0 <= result["test_accuracy"] <= 1
    assert result["test_examples"] == 20
    assert result["steps"] == 4
    assert result["complete"]
    assert result["selection"] == "best validation accuracy"
    assert set(result["baselines"]) >= {"majority", "first_token"}
    assert {"commit", "versions", "device", "cpu"} <= result["environment"].keys()
    assert [(r["kind"], r["step"]) for r in result["curve"]] == [
        ("train", 2), ("eval", 3), ("train", 4), ("eval", 4),
    ]  # fmt: skip
    assert str(trained) not in json.dumps(result)
    assert (trained / "results" / "listops-s5-cpu-seed0.png").read_bytes()[:4] == b"\x89PNG"
    files = {path.name for path in (trained / "run").iterdir()}
    assert files == {
        "config.json", "data.json", "environment.json", "metrics.jsonl", "result.json",
        "tensorboard", "checkpoints",
    }  # fmt: skip


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/STEP"])
def test_evaluating_the_checkpoint_alone_gives_the_recorded_accuracy(trained, part, capsys):
    path = trained / "run" / part.replace("STEP", str(result_of(trained)["test_step"]))
    assert lra_eval.main(["--checkpoint", str(path), "--no-progress"]) == 0
    assert "equal to the recorded accuracy" in capsys.readouterr().out


def test_evaluation_notices_another_accuracy(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "test_accuracy": 2.0}))
    assert lra_eval.main(["--checkpoint", str(run), "--no-progress"]) == 1
    assert "recorded test accuracy 2.0" in capsys.readouterr().err


def test_evaluation_notices_other_data(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    locations = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**locations, "digest": "0"}))
    assert lra_eval.main(["--checkpoint", str(run), "--no-progress"]) == 1
    assert "the data are not those" in capsys.readouterr().err


def test_evaluating_what_is_not_a_run(tmp_path, capsys):
    assert lra_eval.main(["--checkpoint", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.full
def test_resuming_needs_only_the_run_directory(trained, tmp_path):
    whole = read_jsonl(trained / "run" / "metrics.jsonl")
    run = shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "4")
    arguments = ["--resume", "--run-dir", str(run), "--results-dir", str(tmp_path / "results")]
    assert lra_train.main([*arguments, "--no-progress"]) == 0
    assert [r.get("loss") for r in read_jsonl(run / "metrics.jsonl")] == [
        r.get("loss") for r in whole
    ]
    ours, first = result_of(tmp_path), result_of(trained)
    assert ours["starts"] == 2
    assert ours["curve"] == first["curve"]
    assert ours["test_accuracy"] == first["test_accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "lstops", "--model", "s5"], "choose one of listops, text"),
        (["--task", "listops", "--model", "s6"], "choose one of s4, s4d"),
        (["--task", "listops", "--model", "s5", "--preset", "x"], "choose one of paper, cpu"),
        (["--task", "listops"], "needs --task and --model"),
        (["--task", "listops", "--model", "s5", "--set", "train.x=1"], "--train.x=1"),
        (["--task", "listops", "--model", "s5", "--steps", "0"], "steps=0"),
        (["--resume", "--run-dir", "nowhere"], "not a run directory"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    assert lra_train.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_text_without_data_says_where_to_get_them(tmp_path, capsys):
    arguments = ["--task", "text", "--model", "s5", "--run-dir", str(tmp_path / "run")]
    assert lra_train.main([*arguments, "--cache-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "data_dir" in error
    assert not (tmp_path / "run").exists()


def test_a_second_run_does_not_touch_the_first(trained, capsys):
    assert lra_train.main(command(trained)) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_result_is_not_replaced_by_that_of_another_config(trained, capsys):
    other = ["--run-dir", str(trained / "other")]
    assert lra_train.main(command(trained, *other, "--set", "train.learning_rate=0.1")) == 2
    error = capsys.readouterr().err
    assert "train.learning_rate" in error
    assert "--results-dir" in error
    assert not (trained / "other").exists()


def test_resuming_with_another_config_names_the_field(trained, capsys):
    arguments = ["--resume", "--run-dir", str(trained / "run"), "--train.weight-decay", "0.5"]
    assert lra_train.main(arguments) == 2
    assert "train.weight_decay=0.5 (saved: 0.04)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "other", "saved"),
    [("task", "text", "listops"), ("model", "s4d", "s5"), ("preset", "paper", "cpu"),
     ("seed", "1", "0")],
)  # fmt: skip
def test_resuming_under_another_name_is_refused(trained, name, other, saved, capsys):
    arguments = ["--resume", "--run-dir", str(trained / "run"), f"--{name}", other]
    assert lra_train.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"--{name} {other}: the run in {trained / 'run'} has {saved}" in error


def test_a_run_is_found_by_what_it_was_and_filed_under_what_it_is(trained, monkeypatch):
    monkeypatch.setattr(lra_train, "RUNS", trained)
    shutil.copytree(trained / "run", trained / "listops-s5-cpu-seed0")
    names = lra_train.Arguments(task="listops", model="s5", resume=True)
    config, run_dir = lra_train.resolve(names)
    assert (run_dir.name, config.lengths) == ("listops-s5-cpu-seed0", (24,))
    fresh = lra_train.Arguments(task="listops", model="s5")
    config, run_dir = lra_train.resolve(fresh, ["--train.seed", "3"])
    assert run_dir.name == config.name == "listops-s5-cpu-seed3"


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        lra_train.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--task listops --model s5 --preset cpu" in text
    assert "--resume" in text


def test_the_fields_of_a_config_are_shown_on_request(capsys):
    with pytest.raises(SystemExit) as caught:
        lra_train.main(["--task", "listops", "--model", "s5", "--help-fields"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--train.learning-rate" in text
    assert "--classifier.backbone.mixers.0.state-size" in text


def test_the_traceback_is_shown_on_request(capsys):
    assert lra_train.main(["--task", "x", "--model", "s5", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["listops", "text"])
def test_a_part_of_the_data_is_accepted_by_option_only(task):
    arguments = lra_train.Arguments(task=task, model="s5")
    assert not lra_train.resolve(arguments)[0].data.allow_partial
    arguments = dataclasses.replace(arguments, allow_partial=True)
    assert lra_train.resolve(arguments)[0].data.allow_partial
