"""The published settings, what the CPU preset changes, and changes by path."""

import json
from pathlib import Path

import pytest

from experiments.lra.presets import (
    CPU_CHANGES,
    PAPER,
    ExperimentConfig,
    experiment,
)
from experiments.run import UsageError, parse_changes, result_path, with_changes
from seqmodels.config import from_dict, to_dict


def flat(value, prefix=""):
    """Leaves by path; a layout and other lists of scalars are leaves."""
    if isinstance(value, dict) and value:
        pairs = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        pairs = enumerate(value)
    else:
        return {prefix[:-1]: value}
    return {k: v for key, item in pairs for k, v in flat(item, f"{prefix}{key}.").items()}


@pytest.mark.parametrize(("task", "model"), PAPER)
def test_cpu_differs_from_paper_in_the_listed_fields_only(task, model):
    paper, cpu = (flat(to_dict(experiment(task, model, preset))) for preset in ("paper", "cpu"))
    different = {path for path in paper.keys() | cpu.keys() if paper.get(path) != cpu.get(path)}
    assert different - {"preset"} == set(CPU_CHANGES[task, model])


@pytest.mark.parametrize(("task", "model"), PAPER)
@pytest.mark.parametrize("preset", ["paper", "cpu"])
def test_configs_survive_json(task, model, preset):
    config = experiment(task, model, preset, seed=7)
    assert from_dict(ExperimentConfig, to_dict(config)) == config
    assert (config.task, config.model, config.preset) == (task, model, preset)
    assert config.train.seed == 7


def test_published_s5_listops():
    config = experiment("listops", "s5", "paper")
    train, backbone = config.train, config.classifier.backbone
    assert (train.learning_rate, train.group_learning_rates) == (3e-3, {"ssm": 1e-3})
    assert (train.weight_decay, train.batch_size, train.warmup_steps) == (0.04, 50, 1920)
    assert train.steps == 40 * 1920
    assert (len(backbone.layout), backbone.width, backbone.gate) == (8, 128, "half_glu2")
    assert (backbone.norm, backbone.prenorm, backbone.dropout) == ("batch", True, 0.0)
    (mixer,) = backbone.mixers
    assert (mixer.state_size, mixer.blocks, mixer.decay) == (16, 8, "BfastandCdecay")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lstops", "s5", "cpu"), "task='lstops'.*listops, text"),
        (("text", "s6", "cpu"), "model='s6'.*s4d, s5"),
        (("text", "s5", "gpu"), "preset='gpu'.*paper, cpu"),
    ],
)
def test_unknown_names_list_the_known_ones(arguments, message):
    with pytest.raises(UsageError, match=message):
        experiment(*arguments)


def test_changes_by_path():
    config = with_changes(
        experiment("listops", "s5", "cpu"),
        parse_changes(
            ["train.learning_rate=1", "classifier.backbone.mixers.0.blocks=2",
             "train.group_learning_rates.main=0.5", "train.schedule=linear", "lengths=[50, 200]"]
        ),
    )  # fmt: skip
    assert config.train.learning_rate == 1.0
    assert config.classifier.backbone.mixers[0].blocks == 2
    assert config.train.group_learning_rates == {"ssm": 1e-3, "main": 0.5}
    assert config.train.schedule == "linear"
    assert config.lengths == (50, 200)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.lr=1", "no field 'train.lr'.*learning_rate"),
        ("trian.steps=1", "no field 'trian'.*train"),
        ("lengths.9=1", "no field 'lengths.9'.*0 to 1"),
        ("train.steps.x=1", "no field 'train.steps.x'"),
        ("train.steps=many", "train.steps='many'"),
        ("train.steps=0", "steps=0"),
        ("train.steps", "must look like"),
    ],
)
def test_bad_changes_name_the_field(setting, message):
    with pytest.raises(UsageError, match=message):
        with_changes(experiment("listops", "s5", "cpu"), parse_changes([setting]))


RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "lra"


@pytest.mark.parametrize(("task", "model"), [("listops", "s5"), ("text", "s4d")])
def test_committed_results_are_those_of_the_presets(task, model):
    """Or the README's command would refuse to replace them."""
    config = experiment(task, model, "cpu")
    assert result_path(RESULTS, config.name, config).exists()


def test_a_result_may_lack_fields_that_are_newer_but_not_differ(tmp_path):
    config = experiment("listops", "s5", "cpu")
    saved = to_dict(config)
    del saved["train"]["select"]
    path = tmp_path / f"{config.name}.json"
    path.write_text(json.dumps({"config": saved}))
    assert result_path(tmp_path, config.name, config) == path
    saved["train"]["steps"] += 1
    path.write_text(json.dumps({"config": saved}))
    with pytest.raises(UsageError, match=r"another config \(train.steps="):
        result_path(tmp_path, config.name, config)
