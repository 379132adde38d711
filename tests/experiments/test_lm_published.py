"""`seqmodels lm generate --from`: a published checkpoint with its own tokenizer."""

import json

import pytest

from experiments.lm import generate as lm_generate
from experiments.lm.published import load_published
from seqmodels.generation import Sampling, generate
from seqmodels.interop.huggingface import save
from seqmodels.models import LanguageModel
from tests.seqmodels.interop.checkpoints import OURS, random_params

tokenizers = pytest.importorskip("tokenizers")


def words(size):
    """A tokenizer of words w0, w1, ..; unknown words are w0."""
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    model = LanguageModel(OURS["mamba"])
    save(model, random_params(model), path)
    words(40).save(str(path / "tokenizer.json"))
    return path


def said(capsys, *arguments):
    assert lm_generate.main([*map(str, arguments), "--temperature", "0"]) == 0
    return capsys.readouterr().out


def test_text_is_continued_with_the_checkpoints_tokenizer(folder, capsys):
    published = load_published(folder)
    tokens = published.encode("w3 w4 w5")
    assert tokens == [3, 4, 5]
    greedy = Sampling(temperature=0)
    (expected,) = generate(
        published.model, published.variables, [tokens], max_new_tokens=20, sampling=greedy
    )
    out = said(capsys, "--from", folder, "--prompt", "w3 w4 w5", "--length", 20)
    assert out.removeprefix("w3 w4 w5").split() == [f"w{token}" for token in expected]
    # A token of the checkpoint that ends a text, and a --stop.
    end = expected[4]
    assert end not in expected[:4]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    out = said(capsys, "--from", folder, "--prompt", "w3 w4 w5", "--length", 20)
    assert out.split() == ["w3", "w4", "w5", *(f"w{token}" for token in expected[:5])]
    (folder / "generation_config.json").unlink()
    stop = f"w{expected[2]}"
    out = said(capsys, "--from", folder, "--prompt", "w3 w4 w5", "--length", 20, "--stop", stop)
    assert stop not in out.removeprefix("w3 w4 w5")


def test_a_text_without_tokens_begins_with_the_checkpoints_first(folder):
    published = load_published(folder)
    with pytest.raises(ValueError, match="prompt='' has no tokens"):
        published.encode("")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 7}))
    assert load_published(folder).encode("") == [7]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --checkpoint, a run of"),
        (["--checkpoint", "x", "--from", "y"], "give one of --checkpoint, a run of"),
        (["--from", "y", "--mesh", "seq=2"], "--mesh and --max-length belong to --checkpoint"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, capsys):
    assert lm_generate.main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_tokenizer_that_is_not_the_models_is_refused(folder, tmp_path, capsys):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    for write, message in (
        (lambda path: None, "tokenizer.json is missing"),
        (lambda path: path.write_text("{}"), "is no tokenizer"),
        (lambda path: words(41).save(str(path)), "has 41 tokens, the model's vocabulary is 40"),
    ):
        write(tmp_path / "tokenizer.json")
        assert lm_generate.main(["--from", str(tmp_path), "--prompt", "w1"]) == 1
        assert message in " ".join(capsys.readouterr().err.split())
