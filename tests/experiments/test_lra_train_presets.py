"""The published settings, what other presets change in them, and changes by path."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.command_line import UsageError, as_options, changed
from experiments.lra import presets
from experiments.lra.convolutions import CONVOLUTIONS
from experiments.lra.experiment import INTERFACES, ExperimentConfig, Model, Preset, Task
from experiments.lra.presets import PAPER, experiment
from experiments.lra.presets.models import OURS
from experiments.lra.run import make_task
from experiments.run import result_path
from seqmodels.config import from_dict, to_dict
from seqmodels.data.lra import TASKS
from seqmodels.mixers import ParamLabel, build
from seqmodels.parallel.mesh import make_mesh, put_batch
from seqmodels.training.optimizer import schedule
from seqmodels.training.state import create_state, optimizer_of
from seqmodels.training.step import make_train_step
from tests.tiers import one_of_many


def flat(value, prefix=""):
    """Leaves by path; a layout and other lists of scalars are leaves."""
    if isinstance(value, dict) and value:
        pairs = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        pairs = enumerate(value)
    else:
        return {prefix[:-1]: value}
    return {k: v for key, item in pairs for k, v in flat(item, f"{prefix}{key}.").items()}


MODELS, TASK_NAMES, PRESETS = get_args(Model), get_args(Task), get_args(Preset)
SCHEDULE = {
    "preset", "train.steps", "train.batch_size", "train.warmup_steps", "train.eval_every",
    "train.checkpoint_every",
}  # fmt: skip
SMALLER = SCHEDULE | {
    "lengths", "classifier.backbone.width", "classifier.backbone.layout", "classifier.backbone.mlp",
    "train.learning_rate", "train.schedule",
}  # fmt: skip
EASIER = {"min_length", "max_length", "difficulty", "train", "validation", "test"}


def different(task, model, preset):
    paper, other = (flat(to_dict(experiment(task, model, p))) for p in ("paper", preset))
    return {path for path in paper.keys() | other.keys() if paper.get(path) != other.get(path)}


EVERY = list(itertools.product(TASK_NAMES, MODELS, PRESETS))


@pytest.mark.parametrize("task", TASK_NAMES)
def test_presets_differ_from_paper_in_what_costs_time(task):
    for model in ("s4", "s5", "transformer", "gla", "scout"):
        assert different(task, model, "gpu-15min") <= SCHEDULE
        for preset in ("cpu", "cpu-hour"):
            rest = different(task, model, preset) - SMALLER
            mixer = {path for path in rest if path.startswith("classifier.backbone.mixers.0.")}
            assert rest - mixer <= {f"data.{name}" for name in EASIER}
            sizes = {"state_size", "blocks", "heads", "head_size", "groups", "layers", "init_std"}
            assert {path.split(".")[-1] for path in mixer} <= sizes


def test_what_make_lra_runs_is_the_published_model_made_smaller():
    assert different("listops", "s5", "cpu") == {
        "preset", "classifier.backbone.width", "classifier.backbone.layout", "train.steps",
        "train.warmup_steps", "train.eval_every", "train.checkpoint_every", "lengths",
        "data.min_length", "data.max_length",
    }  # fmt: skip


@pytest.mark.parametrize(
    "task", one_of_many(TASK_NAMES, ["listops", "retrieval", "path-x", "speech"])
)
def test_every_model_has_every_preset(task):
    for model, preset in itertools.product(MODELS, PRESETS):
        config = experiment(task, model, preset, seed=7)
        assert from_dict(ExperimentConfig, to_dict(config)) == config
        assert (config.task, config.model, config.preset) == (task, model, preset)
        assert config.train.seed == 7
        assert config.name == f"{task}-{model}-{preset}-seed7"
        assert config.lengths[-1] >= config.data.longest


def abstract(task, model, preset):
    """The training task and shapes of its variables and of a batch of the longest rows."""
    config = experiment(task, model, preset)
    interface, trained = INTERFACES[task], make_task(config)
    rows = (2, 2, config.lengths[-1]) if task == "retrieval" else (2, config.lengths[-1])
    ids = jax.ShapeDtypeStruct(rows, "int32")
    batch = {
        "inputs": ids
        if interface.vocabulary
        else jax.ShapeDtypeStruct((*rows, interface.channels), "float32"),
        "segment_ids": ids,
        "labels": jax.ShapeDtypeStruct((2,), "int32"),
        "weights": jax.ShapeDtypeStruct((2,), "float32"),
    }
    return config, trained, jax.eval_shape(trained.init, jax.random.key(0)), batch


@pytest.mark.parametrize(
    ("task", "model", "preset"),
    one_of_many(EVERY, [("retrieval", "s5", "cpu"), ("image", "transformer", "cpu")]),
)
def test_models_take_what_their_task_is(task, model, preset):
    """Traced only: a batch of the longest rows gives a loss, and all groups have a rate."""
    config, trained, variables, batch = abstract(task, model, preset)
    sums, _, _ = jax.eval_shape(lambda v, b: trained.loss(v, b, None, None), variables, batch)
    assert sums.loss.shape == ()
    assert variables["params"]["head"]["kernel"].shape[1] == INTERFACES[task].classes
    labels = trained.param_labels(variables["params"])
    groups = {label.group for label in jax.tree.leaves(labels, is_leaf=is_label)}
    assert groups == {"main", *config.train.group_learning_rates}


def is_label(leaf):
    return isinstance(leaf, ParamLabel)


@pytest.mark.parametrize("model", one_of_many(MODELS, ["rotary"]))
def test_models_learn_a_batch(model):
    """Three steps on four rows of ListOps, one layer of the CPU's model: the loss falls."""
    config = changed(
        experiment("listops", model, "cpu"),
        as_options(["data.max_length=32", "data.min_length=8", "lengths=[32]",
                    "train.batch_size=4", "train.warmup_steps=0"]),
    )  # fmt: skip
    backbone = config.classifier.backbone
    one = dataclasses.replace(backbone, layout=backbone.layout[:1])
    classifier = dataclasses.replace(config.classifier, backbone=one)
    trained = make_task(dataclasses.replace(config, classifier=classifier))
    mesh = make_mesh(devices=jax.devices()[:1])
    step = make_train_step(trained, optimizer_of(trained, config.train), mesh)
    state, losses = create_state(trained, config.train, mesh), []
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.integers(1, 16, (4, 32)).astype(np.int32),
        "segment_ids": np.ones((4, 32), np.int32),
        "labels": np.arange(4, dtype=np.int32),
        "weights": np.ones(4, np.float32),
    }
    for _ in range(3):
        state, metrics = step(state, put_batch(batch, mesh), jnp.asarray(True))
        losses.append(float(metrics.sums.loss))
    assert losses[2] < losses[0]


def test_parameters_of_published_models():
    """By hand; S5 on ListOps has 128 channels and 8 complex states, in 8 layers."""
    channels, states, layers, symbols, classes = 128, 8, 8, 16, 10
    system = 2 * states + 2 * states * channels + states + channels  # Lambda, B, steps, D
    outputs = 2 * 2 * channels * states  # C, from either side
    block = system + outputs + channels * (channels + 1) + 2 * channels  # gate, norm
    expected = layers * block + symbols * channels + classes * (channels + 1)
    _, _, variables, _ = abstract("listops", "s5", "paper")
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected
    # Long Range Arena's Transformer on Image: one layer, learned positions, a class token.
    width, inner, hidden, length = 128, 64, 128, 1025
    block = 4 * width * inner + 2 * width * hidden + hidden + width + 4 * width
    expected = block + 2 * width + (1 + length) * width + 2 * width + 10 * (width + 1)
    _, _, variables, _ = abstract("image", "transformer", "paper")
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected


def test_published_settings_are_told_from_ours():
    assert set(presets.TASKS) == set(TASKS) == set(INTERFACES) == set(TASK_NAMES)
    others = {*OURS, *CONVOLUTIONS}
    assert {model for task, model in PAPER if task == "listops"} == set(MODELS) - others
    assert not {task for task, _ in PAPER} & {"path-256", "cifar", "mnist", "pmnist"}
    assert all(config.preset == "paper" for config in PAPER.values())


def test_long_range_arenas_transformer_has_its_rates():
    """0.05 min(1, s / w) / sqrt(max(s, w)) at step s with a warm-up of w steps."""
    for task, warmup in (("listops", 1_000), ("text", 8_000), ("retrieval", 8_000)):
        train = experiment(task, "transformer", "paper").train
        rate = schedule(train, train.learning_rate)
        for n in (0, 500, 4_000, train.steps - 1):
            expected = 0.05 * min(1, (n + 1) / warmup) / max(n + 1, warmup) ** 0.5
            assert float(rate(n)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        ("image", "data.colour=true", "task='image' does not have data="),
        ("path-x", "data.size=32", "task='path-x' does not have data="),
        ("pmnist", "data.permuted=false", "task='pmnist' does not have data="),
        ("image", "classifier.vocabulary_size=256", "vocabulary_size=256.*has real inputs"),
        ("image", "interaction=nli", "interaction='nli'.*has 1 inputs"),
        ("retrieval", "interaction=null", "interaction=None.*has 2 inputs"),
        (
            "image",
            "lengths=[1000]",
            "would cut rows of up to 1024 tokens: end with that or more; see",
        ),
        ("pathfinder", "data.test=0", "leaves nothing to test on"),
    ],
)
def test_models_and_data_that_do_not_fit_a_task(task, setting, message):
    with pytest.raises(UsageError, match=message):
        changed(experiment(task, "s5", "cpu"), as_options([setting]))


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
        (("text", "s6", "cpu"), "model='s6'.*s4d, .*s5"),
        (("text", "s5", "gpu"), "preset='gpu'.*paper, cpu"),
    ],
)
def test_unknown_names_list_the_known_ones(arguments, message):
    with pytest.raises(UsageError, match=message):
        experiment(*arguments)


@pytest.mark.parametrize("form", ["options", "settings"])
def test_any_field_is_an_option_and_set_is_the_same(form):
    options = [
        "--train.learning-rate", "1", "--classifier.backbone.mixers.0.blocks", "2",
        "--train.group-learning-rates.ssm", "0.5", "--train.schedule", "linear",
        "--lengths", "50", "200", "--train.clip-norm", "3",
        "--classifier.backbone.prenorm", "False", "--train.mesh.data", "-1",
        "--train.warmup-steps", "3000", "--train.steps", "4000",
    ]  # fmt: skip
    settings = [
        "train.learning_rate=1", "classifier.backbone.mixers.0.blocks=2",
        "train.group_learning_rates.ssm=0.5", "train.schedule=linear", "lengths=[50, 200]",
        "train.clip_norm=3.0", "classifier.backbone.prenorm=false", "train.mesh.data=-1",
        "train.warmup_steps=3000", "train.steps=4000",
    ]  # fmt: skip
    config = changed(
        experiment("listops", "s5", "cpu"),
        options if form == "options" else as_options(settings),
    )
    assert config.train.learning_rate == 1.0
    assert config.classifier.backbone.mixers[0].blocks == 2
    assert config.classifier.backbone.prenorm is False
    assert config.train.group_learning_rates == {"ssm": 0.5}
    assert (config.train.schedule, config.train.clip_norm) == ("linear", 3.0)
    assert (config.train.warmup_steps, config.train.steps) == (3000, 4000)
    assert config.lengths == (50, 200)
    again = changed(config, as_options(["train.clip_norm=null", 'train.schedule="cosine"']))
    assert (again.train.clip_norm, again.train.schedule) == (None, "cosine")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.lr=1", "Unrecognized options: --train.lr=1; see --help-fields"),
        ("train.learning_rat=1", "Perhaps you meant --train.learning-rate"),
        ("trian.steps=1", "Unrecognized options: --trian.steps=1"),
        ("train.steps=many", "--train.steps: invalid literal.*many"),
        ("train.steps=0", "steps=0 must be positive"),
        ("train.steps=null", "train.steps.*None"),
        ("train.learning_rate=NaN", "learning_rate=nan must be positive and finite"),
        ("train.seed=99999999999999999999", r"seed=9+ must be in \[0, 2\*\*32\)"),
        ("train.mesh.data=0", "data=0 must be positive, or -1"),
        ("train.mesh={}", "set each field of it"),
        ("train.steps", "must look like"),
        ("lengths=[]", "lengths.* must be increasing, and at least one"),
        ("lengths=[5]", r"lengths=\(5,\) would cut rows of up to 199 tokens"),
        ("lengths=[300, 200]", "must be increasing"),
        ("data.validation=0", "leaves nothing for train.select='accuracy'"),
        ("data.test=0", "leaves nothing to test on"),
        ("data.train=3", "train.batch_size=50 is more than data.train=3"),
        ("classifier.vocabulary_size=15", "vocabulary_size=15 is too small"),
        ("classifier.vocabulary_size=null", "vocabulary_size=None is too small"),
        ("classifier.num_classes=9", "num_classes=9 is too small"),
        ('classifier.backbone.layout=["s4d"]', "must name every config in mixers"),
    ],
)
def test_bad_changes_name_the_field(setting, message):
    with pytest.raises(UsageError, match=message) as caught:
        changed(experiment("listops", "s5", "cpu"), as_options([setting]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["task=text", "model=s4d", "preset=foo", "preset=../../x"])
def test_names_are_not_fields_to_change(setting):
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        changed(experiment("listops", "s5", "cpu"), as_options([setting]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "text"}, "task='text' does not have data=ListOpsConfig"),
        ({"task": "../x"}, "task='../x' is not one of 'listops', 'text'"),
        ({"model": "s4d"}, "model='s4d' is not what layout="),
        ({"preset": "../x"}, "preset='../x' is not one of 'paper', 'cpu', 'cpu-hour'"),
    ],
)
def test_a_config_whose_names_are_false_cannot_be_made(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(experiment("listops", "s5", "cpu"), **change)


def test_the_last_checkpoint_needs_no_validation():
    options = as_options(["data.validation=0", "train.select=last"])
    config = changed(experiment("listops", "s5", "cpu"), options)
    assert (config.data.validation, config.train.select) == (0, "last")


RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "lra"


def test_the_committed_result_of_make_lra_is_that_of_its_preset():
    config = experiment("listops", "s5", "cpu")
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


@pytest.mark.parametrize(("model", "sees"), CONVOLUTIONS.items())
def test_a_convolution_sees_so_many_tokens_and_nothing_else_is_changed(model, sees):
    config, whole = (experiment("listops", name, "cpu", 3) for name in (model, "s5"))
    assert config.name == f"listops-{model}-cpu-seed3"
    assert (config.data, config.lengths) == (whole.data, whole.lengths)
    backbone = config.classifier.backbone
    (conv,) = backbone.mixers
    back = dataclasses.replace(
        backbone, layout=("s5",) * 6, mixers=whole.classifier.backbone.mixers
    )
    assert back == whole.classifier.backbone
    mixer, x = build(conv, 2), np.ones((1, 81, 2), np.float32)
    variables = jax.jit(mixer.init)(jax.random.key(0), x)
    moved = x + np.eye(81, dtype=np.float32)[:, :, None]
    run = jax.jit(mixer.apply)
    y, z = (np.asarray(run(variables, each)[0])[:, 40, 0] for each in (x, moved))
    assert np.flatnonzero(z != y[0]).tolist() == [t for t in range(81) if abs(t - 40) <= sees // 2]
