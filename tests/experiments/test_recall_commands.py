"""The recall experiments end to end: training, killing, sweeping, reporting, on tiny models."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.command_line import UsageError
from experiments.recall import eval as recall_eval
from experiments.recall import memory, report, sweep
from experiments.recall import train as recall_train
from experiments.recall.experiment import ExperimentConfig
from experiments.recall.findings import FINDINGS, OF_EVALUATIONS, check
from experiments.recall.mixers import BOTH_SIDES, CAUSAL, NAMES
from experiments.recall.presets import PRESETS, experiment
from experiments.recall.result import read_result
from experiments.recall.run import load_trained, score
from seqmodels.config import from_dict, to_dict
from seqmodels.data import recall
from seqmodels.data.recall import TASKS
from seqmodels.training.metrics import TIMING_FIELDS, read_jsonl
from tests.experiments.legible import illegible, too_long
from tests.seqmodels.training.compilation import on_one_device
from tests.tiers import one_of_many

FAST = ["--train.steps", "3", "--train.checkpoint-every", "1", "--train.eval-every", "3"]


@pytest.fixture(scope="module", autouse=True)
def _setting(tmp_path_factory):
    """One device is enough for the tiny batches, and one compilation for all runs."""
    with on_one_device(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recall")


def swept(folder, *more):
    return sweep.main(
        ["--tasks", "mqar", "--mixers", "s5", "--sizes", "4", "--preset", "tiny",
         "--runs-dir", str(folder / "runs"), "--results-dir", str(folder / "results"),
         "--no-progress", "--multiples", "1", "2", *FAST, *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(folder):
    """A grid of one run."""
    assert swept(folder) == 0
    return folder


def test_a_grid_has_each_model_once():
    arguments = sweep.Arguments(tasks=("mqar", "mqar"), mixers=("s5", "attention"), sizes=(4, 2))
    names = [config.name for config in sweep.grid(arguments)]
    assert names == [f"mqar-{run}-cpu-seed0" for run in ("s5-2", "s5-4", "attention-2")]


@pytest.mark.full
def test_the_committed_grid_has_what_the_findings_need():
    committed = sweep.grid(sweep.Arguments(grid="committed"))
    names = [config.name for config in committed]
    assert len(set(names)) == len(names) > 100
    every = {*CAUSAL, "jrt", *BOTH_SIDES}
    assert {config.mixer for config in committed if config.task == "mqar"} == every
    assert {config.mixer for config in committed if config.task == "s5-swaps"} == set(
        sweep.TRACKING
    )
    assert sum(config.repeats == 2 for config in committed) == len(sweep.RECURRENT)
    # Their results are there, and of these configs, whatever fields have come since.
    assert all(sweep.finished(config, report.COMMITTED) for config in committed)


def test_every_run_leaves_a_result(made):
    (path,) = (made / "results").glob("*.json")
    assert path.name == "mqar-s5-4-tiny-seed0.json"
    result = read_result(path)
    assert result["tests"].keys() == {1, 2}
    assert (result["steps"], result["trained_tokens"], result["complete"]) == (3, 16, True)
    assert result["tests"][2]["tokens"] == 32
    assert result["config"]["train"]["max_minutes"] == 10.0
    assert {"commit", "versions", "device", "cpu"} <= result["environment"].keys()
    assert str(made) not in json.dumps(result)
    # 8 complex states, which stand for their conjugates too, position and segment, of one block.
    assert result["state_bytes"] == 8 * 8 + 2 * 4


def test_finished_runs_are_not_made_again(made, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "make", lambda *_: pytest.fail("made again"))
    assert swept(made) == 0
    assert "1 in the grid, 1 of them done" in capsys.readouterr().out


@pytest.mark.full
def test_a_killed_run_goes_on_and_ends_the_same(made, tmp_path):
    """As after kill -9: checkpoints up to a step, no result, metrics that ran ahead."""
    folder = shutil.copytree(made, tmp_path / "killed")
    (folder / "results" / "mqar-s5-4-tiny-seed0.json").unlink()
    run = folder / "runs" / "mqar-s5-4-tiny-seed0"
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "3")
    assert swept(folder) == 0
    records = [
        [{k: v for k, v in record.items() if k not in TIMING_FIELDS}
         for record in read_jsonl(path / "runs" / "mqar-s5-4-tiny-seed0" / "metrics.jsonl")]
        for path in (folder, made)
    ]  # fmt: skip
    assert records[0] == records[1]
    again, before = (
        read_result(path / "results" / "mqar-s5-4-tiny-seed0.json") for path in (folder, made)
    )
    assert again["tests"] == before["tests"]
    variables = [
        load_trained(path / "runs" / "mqar-s5-4-tiny-seed0").variables for path in (folder, made)
    ]
    jax.tree.map(np.testing.assert_array_equal, *variables)


def test_other_settings_are_another_grid(made, capsys):
    assert swept(made, "--train.learning-rate", "0.5") == 2
    assert "is the result of another config" in capsys.readouterr().err


def test_a_dry_run_lists_and_makes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert swept(tmp_path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "mqar-s5-4-tiny-seed0" in out
    assert too_long(out) == []
    assert not list(tmp_path.iterdir())


def test_a_grid_that_does_not_fit_is_refused_with_the_numbers(tmp_path, capsys):
    assert swept(tmp_path, "--memory-gb", "0.0001") == 1
    assert "needs about 0.0 GB, there are 0.0" in capsys.readouterr().err
    assert swept(tmp_path, "--memory-gb", "2", "--train.batch-size", "1000000", "--dry-run") == 1
    assert "GB, there are 2.0: take a smaller --train.batch-size" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_memory_grows_with_the_batch_and_falls_with_micro_batches():
    config = experiment("mqar", "s5", "tiny")

    def needed(**changes):
        train = dataclasses.replace(config.train, **changes)
        return memory.bytes_needed(dataclasses.replace(config, train=train))

    # Parameters stay, the rest is of the rows.
    one, two = needed(batch_size=4), needed(batch_size=8)
    assert one < two < 2 * one
    assert needed(batch_size=8, accumulate=2) == one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mqra"], "task='mqra' is not known (did you mean mqar?)"),
        (["--mixers", "mamba4"], "mixer='mamba4' is not known (did you mean mamba?)"),
        (["--mixers", "parallel"], "mixer='parallel' is not known"),
        (["--preset", "gpu"], "preset='gpu' is not known (did you mean cpu?)"),
        (["--data.pairs", "99"], "MQARConfig: length=16 must be even and at least 4 * pairs = 396"),
    ],
)
def test_bad_grids_are_refused(arguments, message, tmp_path, capsys):
    assert swept(tmp_path, "--dry-run", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_every_task_and_mixer_is_an_experiment(preset):
    """And can be tested at some longer length."""
    for task in TASKS:
        config = experiment(task, "s5", preset, seed=3)
        assert from_dict(ExperimentConfig, to_dict(config)) == config
        assert {1, 2} <= config.tests().keys()
        assert config.train.seed == 3
    for mixer in NAMES:
        config = experiment("mqar", mixer, preset)
        assert from_dict(ExperimentConfig, to_dict(config)) == config
        causal = mixer not in ("jrt", *BOTH_SIDES)
        assert all(part.causal == causal for part in config.model.backbone.mixers)
    parity = experiment("parity", "s5", preset)
    other = dataclasses.replace(parity.data, group="s3")
    with pytest.raises(ValueError, match="task='parity' does not have data"):
        dataclasses.replace(parity, data=other)


@pytest.mark.parametrize("task", one_of_many(TASKS, []))
def test_every_task_trains(task, tmp_path):
    assert recall_train.main(
        ["--task", task, "--mixer", "gla", "--preset", "tiny", "--no-progress", "--run-dir",
         str(tmp_path / "run"), "--results-dir", str(tmp_path), "--multiples", "1", *FAST]
    ) == 0  # fmt: skip
    result = read_result(tmp_path / f"{task}-gla-8-tiny-seed0.json")
    assert result["tests"][1]["counted"] > 0


@pytest.mark.parametrize("mixer", one_of_many(NAMES, []))
@pytest.mark.parametrize("size", [4, 8])
def test_every_mixer_trains(mixer, size, tmp_path):
    task = "mqar" if mixer == "jrt" else "parity"
    assert recall_train.main(
        ["--task", task, "--mixer", mixer, "--size", str(size), "--preset", "tiny",
         "--no-progress", "--run-dir", str(tmp_path / "run"), "--results-dir", str(tmp_path),
         "--multiples", "1", *FAST]
    ) == 0  # fmt: skip


@pytest.mark.parametrize("name", ["mqar", "regbench", "a5"])
def test_the_oracle_scores_one_and_nonsense_next_to_nothing(name):
    config = TASKS[name]
    rows = {"seed": 1, "examples": 6, "batch_size": 4}

    def oracle(_, inputs):
        return np.stack([config.solve(row) for row in inputs])

    found = score(oracle, {}, recall.eval_batches(config, **rows))
    assert (found.accuracy, found.rows_right, found.tokens) == (1.0, 1.0, config.tokens)
    nonsense = score(lambda _, x: np.zeros_like(x), {}, recall.eval_batches(config, **rows))
    assert nonsense.accuracy < 0.5
    assert nonsense.rows_right == 0.0
    assert nonsense.counted == found.counted > 0


def fake(task, mixer, size=16, state=4096, accuracies=(0.5, 0.4, 0.3, 0.2, 0.1), repeats=1):
    tests = {
        multiple: {"accuracy": value, "rows_right": 0.0, "counted": 10, "tokens": 64 * multiple}
        for multiple, value in zip((1, 2, 4, 8, 16), accuracies, strict=False)
    }
    return {
        "task": task, "mixer": mixer, "size": size, "preset": "cpu", "repeats": repeats, "seed": 0,
        "tests": tests, "chance": 0.06, "state_bytes": state, "complete": True,
        "environment": {"cpu": "a processor", "commit": "abc"},
    }  # fmt: skip


def evaluated(**accuracies):
    """What experiments.recall.eval writes, of a mamba2."""
    tests = {
        name: {str(m): {"accuracy": a} for m, a in zip((1, 4, 16), values, strict=True)}
        for name, values in accuracies.items()
    }
    return {
        "run": "passkey-mamba2-16-cpu-seed0",
        "evaluations": [
            {"model": name.replace("_", " "), "repeats": 1, "tests": each}
            for name, each in tests.items()
        ],
    }


def test_known_results_are_seen_not_seen_or_not_run():
    assert {each.verdict for each in check([fake("copy", "s5")])} == {"not run"}
    seen = [
        fake("mqar", "attention", accuracies=(0.99,)),
        fake("mqar", "mamba2", 8, 1000, (0.4,)),
        fake("mqar", "mamba2", 32, 4000, (0.7, 0.6, 0.5, 0.4, 0.2)),
        fake("mqar", "gated_deltanet", 8, 1000, (0.8,)),
        fake("mqar", "gated_deltanet", 32, 4000, (0.95,)),
        fake("a5", "s4d", accuracies=(0.3,)),
        fake("a5", "deltanet-negative", accuracies=(0.97,)),
        fake("parity", "deltanet-negative", accuracies=(1.0, 1.0, 1.0)),
        fake("parity", "deltanet", accuracies=(1.0, 0.8, 0.5)),
        fake("selective-copy", "mamba", accuracies=(0.9, 0.9, 0.9, 0.9, 0.8)),
        fake("selective-copy", "s4d", accuracies=(0.3,)),
        fake("disjointness-long-first", "gla", accuracies=(0.3,)),
        fake("disjointness-long-first", "gla", accuracies=(0.6,), repeats=2),
        fake("disjointness-long-first", "based", accuracies=(0.3,)),
        fake("disjointness-long-first", "jrt", accuracies=(0.5,)),
        fake("mqar", "mom", 8, 2000, (0.95,)),
        fake("parity", "mamba2", accuracies=(1.0, 0.6, 0.5)),
        fake("parity", "mamba3", accuracies=(1.0, 1.0, 0.9)),
        fake("mqar", "hyena", accuracies=(0.2,)),
    ]
    helped = evaluated(
        as_trained=(1.0, 0.6, 0.1), norm_4=(0.9, 0.8, 0.6), window_64=(0.2, 0.1, 0.1)
    )
    assert {each.verdict for each in check(seen, [helped])} == {"seen"}
    turned = [
        fake("mqar", "attention", accuracies=(0.5,)),
        fake("mqar", "mamba2", 8, 1000, (0.9, 0.9, 0.9, 0.9, 0.9)),
        fake("mqar", "mamba2", 32, 4000, (0.9,)),
        fake("mqar", "gated_deltanet", 8, 1000, (0.5,)),
        fake("a5", "s4d", accuracies=(0.96,)),
        fake("a5", "deltanet-negative", accuracies=(0.5,)),
        fake("parity", "deltanet-negative", accuracies=(1.0, 0.5, 0.5)),
        fake("parity", "deltanet", accuracies=(1.0, 0.8, 0.5)),
        fake("selective-copy", "mamba", accuracies=(0.3,)),
        fake("selective-copy", "s4d", accuracies=(0.3,)),
        fake("disjointness-long-first", "gla", accuracies=(0.3,)),
        fake("disjointness-long-first", "gla", accuracies=(0.3,), repeats=2),
        fake("mqar", "based", accuracies=(0.3,)),
        fake("mqar", "jrt", accuracies=(0.35,)),
        fake("mqar", "mom", 8, 2000, (0.55,)),
        fake("parity", "mamba2", accuracies=(1.0, 0.6, 0.5)),
        fake("parity", "mamba3", accuracies=(1.0, 0.6, 0.5)),
        fake("mqar", "hyena", accuracies=(0.45,)),
    ]
    useless = evaluated(as_trained=(1.0, 0.6, 0.1), norm_4=(1.0, 0.6, 0.1))
    assert {each.verdict for each in check(turned, [useless])} == {"not seen", "not told"}
    assert {each.verdict for each in check([])} == {"not run"}


def test_where_no_model_solves_a_task_nothing_is_told_of_those_that_fail():
    runs = [
        fake("a5", "s4d", accuracies=(0.2,)), fake("a5", "deltanet-negative", accuracies=(0.3,))
    ]  # fmt: skip
    found = {each.claim: each for each in check(runs)}["Diagonal models fail A5 and S5"]
    assert found.verdict == "not told"
    assert found.evidence.endswith("of all: deltanet-negative (16) 0.30 on a5")


def test_the_report_fits_80_columns_and_its_figures_are_legible(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    results = [
        fake(task, mixer, size, 500 * size * (1 + number))
        for task in ("mqar", "a5", "disjointness-long-first", "selective-copy")
        for number, mixer in enumerate(NAMES)
        for size in (8, 16, 32)
    ]
    monkeypatch.setattr(report, "read_results", lambda _: results)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert report.main(["--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert too_long(out.rpartition("report:")[0]) == []
    assert "gated_deltanet-negative" in out
    assert [illegible(figure) for figure in figures] == [[], []]
    page = (tmp_path / "report.md").read_text()
    assert page.count("\n| ") == len(results) + 2
    assert page.count("- **") == len(FINDINGS) + len(OF_EVALUATIONS)


def test_the_report_reads_what_a_sweep_wrote(made, tmp_path, capsys):
    options = ["--results-dir", str(made / "results"), "--output", str(tmp_path)]
    assert report.main(options) == 0
    for name in ("state.png", "length.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "s5" in out
    assert "not run: Attention solves MQAR" in out
    assert report.main([*options, "--tasks", "a5"]) == 2
    assert "there are only results of mqar" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    assert report.main(["--results-dir", str(broken)]) == 1
    assert "no results in" in capsys.readouterr().err
    (broken / "x.json").write_text("{}")
    assert report.main(["--results-dir", str(broken)]) == 1
    assert "is not a result of `seqmodels recall train`" in capsys.readouterr().err


def test_an_unknown_mixer_has_no_preset():
    with pytest.raises(UsageError, match=r"did you mean gated_deltanet\?"):
        experiment("mqar", "gated-deltanet", "tiny")
    assert {"bidirectional", "hydra", "jrt", "orchid"}.isdisjoint(CAUSAL)


def test_jrt_reads_the_context_and_nothing_behind_it():
    config = experiment("mqar", "jrt", "tiny")
    (mixer,) = config.model.backbone.mixers
    assert mixer.prefix == 2 * config.data.pairs
    wide = dataclasses.replace(mixer, prefix=mixer.prefix + 1)
    backbone = dataclasses.replace(config.model.backbone, mixers=(wide,))
    with pytest.raises(ValueError, match="prefix=5 must be at most the 4 tokens"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    with pytest.raises(UsageError, match="this task asks while it goes on; take 'based'"):
        experiment("parity", "jrt", "tiny")


@pytest.mark.parametrize("mixer", BOTH_SIDES)
def test_a_mixer_that_sees_both_sides_takes_tasks_whose_rows_hold_no_answers(mixer):
    for task in ("mqar", "selective-copy", "parity", "induction", "disjointness"):
        assert not experiment(task, mixer, "cpu").model.backbone.mixers[0].causal
    for task in ("copy", "copy-suffix", "passkey", "regbench", "niah-multiquery"):
        with pytest.raises(ValueError, match=f"mixer='{mixer}' sees the answers of task='{task}'"):
            experiment(task, mixer, "cpu")


@pytest.fixture(scope="module")
def selective(folder):
    """A run of mamba2 on selective copying."""
    assert recall_train.main(
        ["--task", "selective-copy", "--mixer", "mamba2", "--preset", "tiny", "--no-progress",
         "--run-dir", str(folder / "selective"), "--results-dir", str(folder / "more"),
         "--multiples", "1", "2", *FAST]
    ) == 0  # fmt: skip
    return folder / "selective"


@pytest.mark.full
def test_other_ways_to_test_a_model(selective, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert recall_eval.main(
        ["--checkpoint", str(selective), "--repeats", "1", "2", "--decay", "1.0", "0.5",
         "--norm", "1000000", "--window", "2", "1000", "--output", str(tmp_path / "out.json"),
         "--multiples", "2"]
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert too_long(out) == []
    assert all(name in out for name in ("as trained", "decay 0.5", "window 2", "2 times"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert str(selective) not in json.dumps(found)
    tests = {(each["model"], each["repeats"]): each["tests"]["2"] for each in found["evaluations"]}
    assert len(tests) == 5 * 2
    trained = read_result(selective.parent / "more" / "selective-copy-mamba2-8-tiny-seed0.json")
    as_trained = tests["as trained", 1]
    assert as_trained == trained["tests"][2]
    # What has no effect has none; reading twice is a longer row with as many questions.
    assert tests["norm 1e+06", 1] == tests["window 1000", 1] == as_trained
    twice = tests["as trained", 2]
    assert (twice["tokens"], twice["counted"]) == (2 * 24 + 4, as_trained["counted"])


def test_what_a_run_cannot_be_tested_for_is_refused(made, capsys):
    run = str(made / "runs" / "mqar-s5-4-tiny-seed0")
    assert recall_eval.main(["--checkpoint", run, "--decay", "0.9"]) == 2
    assert "are for mamba2, the run has s5" in capsys.readouterr().err
    assert recall_eval.main(["--checkpoint", str(made)]) == 2
    assert "no run there" in capsys.readouterr().err


@pytest.mark.full
def test_a_model_can_be_trained_to_read_twice(tmp_path):
    assert recall_train.main(
        ["--task", "disjointness", "--mixer", "s5", "--preset", "tiny", "--no-progress",
         "--run-dir", str(tmp_path / "run"), "--results-dir", str(tmp_path), "--repeats", "2",
         "--multiples", "1", *FAST]
    ) == 0  # fmt: skip
    result = read_result(tmp_path / "disjointness-2times-s5-8-tiny-seed0.json")
    assert (result["repeats"], result["trained_tokens"]) == (2, 2 * 8 + 1)
