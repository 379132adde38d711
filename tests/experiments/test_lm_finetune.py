"""`seqmodels lm finetune`: a published checkpoint, tuned and written back."""

import json

import jax
import numpy as np
import pytest

from experiments.lm import finetune as lm_finetune
from experiments.lm import generate as lm_generate
from seqmodels.data import text
from seqmodels.interop.huggingface import load, save
from seqmodels.models import LanguageModel
from tests.experiments.test_lm_published import words
from tests.seqmodels.interop.checkpoints import OURS, random_params

pytest.importorskip("tokenizers")
QUICK = (
    "--data.length", "16", "--train.batch-size", "2", "--train.warmup-steps", "0",
    "--train.eval-every", "4", "--train.checkpoint-every", "2", "--train.learning-rate", "0.01",
    "--steps", "8", "--mesh", "data=1", "--no-progress",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint with a tokenizer, and two documents of a text that is easy to learn."""
    path = tmp_path_factory.mktemp("source")
    model = LanguageModel(OURS["mamba"])
    save(model, random_params(model), path / "tiny")
    words(40).save(str(path / "tiny" / "tokenizer.json"))
    config = path / "tiny" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token_id": 39}))
    (path / "text.txt").write_text("w1 w2 w3 w4 " * 60 + "|" + "w4 w3 w2 w1 " * 60)
    return path


def tuned(files, folder, *options):
    arguments = (
        "--from", files / "tiny", "--data", files / "text.txt", "--separator", "|",
        "--run-dir", folder / "run", "--results-dir", folder / "results", *QUICK, *options,
    )  # fmt: skip
    return lm_finetune.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        assert tuned(files, folder) == 0
    return folder


def test_the_loss_falls_and_the_checkpoint_is_of_the_same_kind(files, run, capsys):
    (path,) = (run / "results").glob("*.json")
    result = json.loads(path.read_text())
    assert path.stem == "tiny-finetune-seed0"
    assert result["bits_per_byte"] < 0.9 * result["bits_per_byte_before"]
    assert (result["steps"], result["complete"], result["source"]) == (8, True, "tiny")
    assert str(files) not in path.read_text()
    model, params = load(run / "run" / "published")
    source, untuned = load(files / "tiny")
    assert model.config == source.config
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (params, untuned)), strict=True)]
    assert all(moved)
    arguments = ["--from", str(run / "run" / "published"), "--prompt", "w1", "--length", "3"]
    assert lm_generate.main(arguments) == 0
    assert capsys.readouterr().out.startswith("w1")


def test_narrow_matrices_are_trained_and_added(files, run, tmp_path):
    """--lora: only the layers named move, by matrices of the rank; the base is the run's own."""
    options = ("--lora", "2", "--lora.layers", "in_proj", "--train.learning-rate", "0.05")
    assert tuned(files, tmp_path, *options) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["bits_per_byte"] < 0.95 * result["bits_per_byte_before"]
    assert (tmp_path / "results" / "tiny-lora-seed0.json").exists()
    (_, params), (_, untuned) = load(tmp_path / "run" / "published"), load(files / "tiny")
    for path, leaf in jax.tree.leaves_with_path(params):
        before = untuned
        for entry in path:
            before = before[entry.key]
        moved = np.asarray(leaf) - np.asarray(before)
        if [entry.key for entry in path][-2:] == ["in_proj", "kernel"]:
            assert np.linalg.matrix_rank(moved, tol=1e-4 * np.abs(moved).max()) == 2
        else:
            assert not moved.any()


@pytest.mark.full
def test_a_stopped_run_goes_on_to_the_same_bits(files, run, tmp_path):
    assert tuned(files, tmp_path, "--max-minutes", "1e-9") == 0
    assert (tmp_path / "run" / "published" / "config.json").exists()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] < 8
    command = ["--resume", "--run-dir", str(tmp_path / "run"), "--train.max-minutes", "None"]
    command += ["--results-dir", str(tmp_path / "again"), "--no-progress"]
    assert lm_finetune.main(command) == 0
    one, two = (load(folder / "run" / "published")[1] for folder in (run, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a new run needs --from and --data"),
        (["--resume"], "--resume needs the --run-dir"),
    ],
)
def test_what_is_missing_is_said(options, message, capsys):
    assert lm_finetune.main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_of_other_parameters_is_refused(files, tmp_path, capsys):
    assert tuned(files, tmp_path, "--model.backbone.mlp", "7") == 1
    assert "changes the parameters" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_documents_of_tokens_stand_between_boundaries():
    made = text.joined([[3, 4], [5]], 9)
    np.testing.assert_array_equal(made.tokens, [9, 3, 4, 9, 5, 9])
    np.testing.assert_array_equal(made.starts, [0, 3])
    assert (made.documents, made.predictions, made.bytes) == (2, 5, 3)
    with pytest.raises(ValueError, match="documents is empty"):
        text.joined([], 9)
