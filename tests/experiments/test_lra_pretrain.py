"""Self-pretraining on a tiny ListOps: where fine-tuning starts, labels, going on when killed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.command_line import UsageError, as_options, changed, parse
from experiments.lra import pretrain as pretraining
from experiments.lra import train
from experiments.lra.presets import experiment
from experiments.lra.pretrain import pretrain, split, with_pretraining
from experiments.lra.run import load_data
from seqmodels.config import to_dict
from seqmodels.models.denoiser import corrupt
from seqmodels.training.denoising import denoising_sums
from seqmodels.training.loop import fit
from seqmodels.training.metrics import read_jsonl
from seqmodels.training.run_directory import open_run
from tests import tolerances
from tests.experiments.test_lra_train import command
from tests.seqmodels.training.compilation import on_one_device

MASKED = ("--pretrain", "masked", "--pretrain.steps=4", "--set", "train.checkpoint_every=2")


class Killed(BaseException):
    """As good as kill -9: nothing behind it runs."""


@pytest.fixture(scope="module", autouse=True)
def _setting(tmp_path_factory):
    with on_one_device(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in a folder, what it learned before it saw labels, and the task it then trained."""
    folder, seen = tmp_path_factory.mktemp("pretrained"), {}

    def learned(*arguments, **options):
        seen["learned"], said = pretrain(*arguments, **options)
        return seen["learned"], said

    def begun(task, *arguments, **options):
        seen["task"] = task
        return fit(task, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "pretrain", learned)
        patch.setattr(train, "fit", begun)
        assert train.main(command(folder, *MASKED)) == 0
    return folder, seen


@pytest.mark.full
def test_fine_tuning_starts_from_what_was_learned(trained):
    folder, seen = trained
    fresh = jax.jit(seen["task"].init)(jax.random.key(0))
    for collection, parts in fresh.items():
        for name, part in parts.items():
            if name == "head":
                assert "head" not in seen["learned"]["params"]
                continue
            jax.tree.map(np.testing.assert_array_equal, part, seen["learned"][collection][name])
    assert {"encoder", "backbone", "head"} == fresh["params"].keys()
    assert seen["learned"]["params"].keys() == {"encoder", "backbone", "denoise"}
    config, _ = tiny(folder)
    initial = jax.jit(pretraining.denoising_task(config).init)(
        jax.random.split(jax.random.key(config.train.seed))[0]
    )
    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), initial["params"], seen["learned"]["params"]
    )
    assert moved["encoder"]["embedding"]
    assert all(jax.tree.leaves(moved["backbone"]["block_0"]["gate"]))
    records = read_jsonl(folder / "run" / "pretrain" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "eval"] == [4]


@pytest.mark.full
def test_the_result_says_how_it_was_pretrained(trained):
    folder, _ = trained
    result = json.loads((folder / "results" / "listops-s5-cpu-masked-seed0.json").read_text())
    said = result["pretraining"]
    assert (said["kind"], said["share"], said["steps"], said["complete"]) == (
        "masked",
        0.1,
        4,
        True,
    )
    assert said["tokens"] > 0
    assert result["steps"] == 4
    assert result["wall_seconds"] > said["wall_seconds"] > 0
    assert "--pretrain masked" in result["command"]
    assert result["config"]["pretrain"] == {"kind": "masked", "steps": 4, "share": 0.1}


def tiny(folder):
    words = command(folder, *MASKED)
    arguments, fields = parse(train.Arguments, words, prog=train.PROG)
    config, _ = train.resolve(arguments, fields)
    return config, load_data(config, cache_dir=str(folder / "cache"), data_dir=None, progress=False)


@pytest.mark.full
def test_labels_are_never_read(trained, tmp_path):
    """Other labels, same bits; and the loss takes a batch that has none."""
    config, data = tiny(trained[0])

    def relabelled(examples):
        return dataclasses.replace(examples, labels=(examples.labels + 1) % 10)

    other = dataclasses.replace(
        data, train=relabelled(data.train), validation=relabelled(data.validation)
    )
    run = open_run(tmp_path / "run", to_dict(config))
    learned, _ = pretrain(config, run, other, show_progress=False)
    jax.tree.map(np.testing.assert_array_equal, learned, trained[1]["learned"])
    task = pretraining.denoising_task(config)
    batch = {
        "inputs": jnp.ones((2, 8), jnp.int32),
        "segment_ids": jnp.ones((2, 8), jnp.int32),
        "weights": jnp.ones(2),
    }
    sums, _, _ = jax.eval_shape(lambda b: task.loss(learned, b, jax.random.key(0), None), batch)
    assert sums.loss.shape == ()


@pytest.mark.full
def test_a_killed_pretraining_goes_on(trained, tmp_path, monkeypatch):
    folder, seen = trained
    (tmp_path / "cache").symlink_to(folder / "cache")

    def kill(what, step):
        if (what, step) == ("step", 3):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "fit", functools.partial(fit, on_event=kill))
        with pytest.raises(Killed):
            train.main(command(tmp_path, *MASKED))
    assert not (tmp_path / "run" / "checkpoints").exists()
    kept = {}

    def learned(*arguments, **options):
        kept["learned"], said = pretrain(*arguments, **options)
        return kept["learned"], said

    monkeypatch.setattr(train, "pretrain", learned)
    resume = ["--resume", "--run-dir", str(tmp_path / "run"), "--no-progress"]
    assert train.main([*resume, "--results-dir", str(tmp_path / "results")]) == 0
    jax.tree.map(np.testing.assert_array_equal, kept["learned"], seen["learned"])
    curves = [
        [record.get("loss") for record in read_jsonl(place / "run" / "metrics.jsonl")]
        for place in (folder, tmp_path)
    ]
    assert curves[0] == curves[1]


def test_half_of_the_steps_are_without_labels():
    config = experiment("image", "gla", "cpu")
    both = with_pretraining(config, "masked")
    assert both.pretrain.share == 0.5
    assert both.pretrain.steps + both.train.steps == config.train.steps
    assert both.name == "image-gla-cpu-masked-seed0"
    before, after = (c.train.warmup_steps / c.train.steps for c in (config, both))
    assert after == pytest.approx(before, abs=0.01)
    assert split(both, 11).pretrain.steps == 5
    assert split(both, 11).train.steps == 6
    assert with_pretraining(config, None) is config


def test_what_sees_both_sides_cannot_be_asked_for_the_next_token():
    with pytest.raises(ValueError, match="model='s5' sees the tokens that it would predict"):
        with_pretraining(experiment("listops", "s5", "cpu"), "causal")
    assert with_pretraining(experiment("listops", "rat", "cpu"), "causal").pretrain.share == 0.1
    with pytest.raises(UsageError, match=r"share=1\.5 must be"):
        changed(
            with_pretraining(experiment("listops", "s5", "cpu"), "masked"),
            as_options(["pretrain.share=1.5"]),
        )


def test_what_is_masked_and_asked_for():
    inputs = jnp.asarray([[3, 4, 5, 6, 0, 0]] * 200)
    real = inputs != 0
    seen, wanted, where = corrupt(inputs, real, "masked", 0.25, jax.random.key(0))
    np.testing.assert_array_equal(seen, np.where(where, 0, inputs))
    np.testing.assert_array_equal(wanted, inputs)
    assert not np.any(where & ~real)
    assert 0.2 < where.sum() / real.sum() < 0.3
    values = jnp.ones((200, 6, 2))
    seen, _, where = corrupt(values, real, "masked", 0.5, jax.random.key(1))
    np.testing.assert_array_equal(seen, np.where(where[..., None], 0, values))
    seen, wanted, where = corrupt(inputs, real, "causal", 0.5, jax.random.key(0))
    np.testing.assert_array_equal(seen, inputs)
    np.testing.assert_array_equal(where[0], [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(wanted[0, :3], [4, 5, 6])


def test_sums_count_the_places_asked_for():
    rng = np.random.default_rng(0)
    said, wanted = rng.normal(size=(2, 3, 4)), np.array([[0, 1, 2], [3, 0, 1]])
    where, weights = np.array([[1, 0, 1], [1, 1, 0]], bool), np.array([1.0, 0.5])
    sums = denoising_sums(*(jnp.asarray(part) for part in (said, wanted, where, weights)))
    loss = correct = weight = 0.0
    for row, place in zip(*np.nonzero(where), strict=True):
        logits = said[row, place]
        answer = wanted[row, place]
        loss += weights[row] * (np.log(np.exp(logits).sum()) - logits[answer])
        correct += weights[row] * (logits.argmax() == answer)
        weight += weights[row]
    found = [float(part) for part in (sums.loss, sums.correct, sums.weight)]
    np.testing.assert_allclose(found, [loss, correct, weight], **tolerances.EACH_FLOAT32_NEAR_ONE)
    values = rng.normal(size=(2, 3, 4))
    sums = denoising_sums(*(jnp.asarray(part) for part in (said, values, where, weights)))
    squares = np.mean((said - values) ** 2, axis=-1)
    expected = np.sum(squares * where * weights[:, None])
    np.testing.assert_allclose(float(sums.loss), expected, **tolerances.EACH_FLOAT32_NEAR_ONE)
    assert float(sums.correct) == 0.0
