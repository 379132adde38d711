"""The commands of the language-model experiments, end to end, on a tiny model and text."""

import io
import json
import math
import shutil
import sys

import jax
import numpy as np
import pytest

from experiments.lm import eval as lm_eval
from experiments.lm import generate as lm_generate
from experiments.lm import train as lm_train
from experiments.lm.run import load_trained
from seqmodels import generation
from seqmodels.data import text
from seqmodels.generation import Sampling
from seqmodels.training.metrics import TIMING_FIELDS, read_jsonl
from tests import tolerances
from tests.seqmodels.training.compilation import on_one_device

STORY = " ".join(f"{n} bottles of beer on the wall, {n} bottles of beer." for n in range(40))


@pytest.fixture(scope="module", autouse=True)
def _setting(tmp_path_factory):
    """One device is enough for the tiny batches, and one compilation for all runs."""
    with on_one_device(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    (folder / "story.txt").write_text(STORY)
    return folder


def train(folder, run, mixer, *more, preset="tiny"):
    return lm_train.main(
        ["--data", str(folder / "story.txt"), "--mixer", mixer, "--preset", preset,
         "--run-dir", str(folder / run), "--results-dir", str(folder / "results"),
         "--no-progress", "--set", "train.steps=6", "--set", "train.eval_every=3",
         "--set", "train.checkpoint_every=2", "--set", "train.log_every=2",
         "--set", "train.learning_rate=0.03", *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def carrying(folder):
    """A run with carried states and averaged parameters."""
    assert train(folder, "run", "s5", "--carry-state", "--ema-decay", "0.5") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def attending(folder):
    """A run of a mixer whose cache grows."""
    assert train(folder, "attending", "attention") == 0
    return folder / "attending"


def result_of(run):
    return json.loads((run / "result.json").read_text())


def test_the_result_says_what_was_run(carrying, folder):
    result = result_of(carrying)
    assert (result["mixer"], result["carry_state"], result["steps"]) == ("s5", True, 6)
    assert result["config"]["train"]["ema_decay"] == 0.5
    assert {"commit", "versions", "device", "cpu"} <= result["environment"].keys()
    assert str(folder) not in json.dumps(result)
    evaluations = [r for r in result["curve"] if r["kind"] == "eval"]
    assert result["validation_loss"] == min(r["loss"] for r in evaluations)
    size = result["validation_bytes"]
    bits = result["validation_loss"] * (size + 1) / size / math.log(2)  # the end is predicted too
    np.testing.assert_allclose(result["bits_per_byte"], bits, **tolerances.EACH_FLOAT64_EQUAL)
    assert (folder / "results" / "s5-tiny-carry-seed0.json").exists()


def test_resuming_is_bitwise_and_needs_only_the_run_directory(carrying, tmp_path):
    run = shutil.copytree(carrying, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / str(step))
    arguments = ["--resume", "--run-dir", str(run), "--results-dir", str(tmp_path / "results")]
    assert lm_train.main([*arguments, "--no-progress"]) == 0
    records = [
        [{k: v for k, v in record.items() if k not in TIMING_FIELDS}
         for record in read_jsonl(path / "metrics.jsonl")]
        for path in (run, carrying)
    ]  # fmt: skip
    assert records[0] == records[1]
    for average in (True, False):
        trained = [load_trained(path / "checkpoints" / "6", average=average).variables
                   for path in (run, carrying)]  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, *trained)


def test_resuming_on_another_text_is_refused(carrying, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(STORY[::-1])
    arguments = ["--resume", "--run-dir", str(carrying), "--data", str(tmp_path / "other.txt")]
    assert lm_train.main([*arguments, "--results-dir", str(tmp_path)]) == 1
    assert "is not the text that the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "other", "saved"),
    [("mixer", "gla", "s5"), ("preset", "cpu", "tiny"), ("seed", "1", "0")],
)
def test_resuming_under_another_name_is_refused(carrying, name, other, saved, capsys):
    arguments = ["--resume", "--run-dir", str(carrying), f"--{name}", other]
    assert lm_train.main(arguments) == 2
    assert f"--{name} {other}: the run in {carrying} has {saved}" in capsys.readouterr().err


def evaluate(checkpoint, data, *more):
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--no-progress", *more]
    return lm_eval.main(arguments)


def figure(capsys):
    return float(capsys.readouterr().out.split(":")[1].split()[0])


def test_evaluation_carries_the_states_through_the_text(carrying, folder, capsys):
    """In chunks, of whatever size, as in one forward pass over the whole text."""
    figures = []
    for chunk in ("64", "1000"):
        assert evaluate(carrying, folder / "story.txt", "--chunk", chunk) == 0
        figures.append(figure(capsys))
    trained = load_trained(carrying)
    tokens = text.encode([STORY.encode()]).tokens[None].astype(np.int32)
    logits = jax.jit(trained.model.apply)(trained.variables, tokens[:, :-1])[0]
    lost = -np.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).sum()
    expected = lost / len(STORY) / math.log(2)
    np.testing.assert_allclose(figures, expected, **tolerances.EACH_FLOAT32_SECOND)
    assert evaluate(carrying, folder / "story.txt", "--context", "8") == 0
    assert abs(figure(capsys) - expected) > 1e-3
    assert evaluate(carrying, folder / "story.txt", "--no-average") == 0
    assert abs(figure(capsys) - expected) > 1e-3


@pytest.mark.full
def test_models_with_growing_caches_are_evaluated_in_windows(attending, folder, capsys):
    assert evaluate(attending, folder / "story.txt") == 0
    assert "windows of 32 bytes" in capsys.readouterr().out


class Stream(io.StringIO):
    """Notes what was written between two flushes."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def flush(self):
        self.pieces.append(self.getvalue()[len("".join(self.pieces)) :])


def generate(checkpoint, *more):
    return lm_generate.main(["--checkpoint", str(checkpoint), *more])


@pytest.mark.full
@pytest.mark.parametrize("run", ["carrying", "attending"])
def test_text_comes_in_pieces_and_is_that_of_generation(run, request, monkeypatch):
    run = request.getfixturevalue(run)
    out = Stream()
    monkeypatch.setattr(sys, "stdout", out)
    assert generate(run, "--prompt", "10 bot", "--length", "40", "--temperature", "0") == 0
    pieces = [piece for piece in out.pieces if piece]
    assert pieces[0] == "10 bot"
    assert len(pieces) >= 3
    trained = load_trained(run)
    (expected,) = generation.generate(
        trained.model,
        trained.variables,
        [[text.BOUNDARY, *b"10 bot"]],
        max_new_tokens=40,
        chunk=8,
        sampling=Sampling(temperature=0.0, stop_tokens=(text.BOUNDARY,)),
    )
    assert out.getvalue() == "10 bot" + text.decode(expected).decode(errors="replace") + "\n"


def test_the_seed_decides_and_an_empty_prompt_begins_a_document(carrying, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        more = ["--length", "24", "--seed", seed, "--top-k", "20", "--top-p", "0.9"]
        assert generate(carrying, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        ([b"ab", b"cd", b"ef"], [], b"abcdef"),
        ([b"ab", b"cd", b"ef"], [b"cd"], b"ab"),
        ([b"ab", b"cd", b"ef"], [b"bc", b"e"], b"a"),
        ([b"ab", b"cd", b"ef"], [b"de"], b"abc"),
        ([b"ab", b"cd"], [b"dx", b"xyz"], b"abcd"),
        ([], [b"a"], b""),
    ],
)
def test_text_ends_before_a_stop_even_across_pieces(pieces, stops, expected):
    assert b"".join(lm_generate.until(iter(pieces), stops)) == expected


def test_a_stop_on_the_command_line(carrying, capsys):
    more = ["--length", "48", "--temperature", "0", "--prompt", "1"]
    assert generate(carrying, *more) == 0
    whole = capsys.readouterr().out
    assert generate(carrying, *more, "--stop", whole[5:7]) == 0
    stopped = capsys.readouterr().out.removesuffix("\n")
    assert stopped == whole[: whole.index(whole[5:7], 1)]


def test_escapes_mean_the_same_in_stops_and_separators(carrying, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(lm_generate, "until", lambda pieces, stops: seen.append(stops) or iter(()))
    texts = [r"\n\n", r"a\tb", r"\\n", r"\d", "\n"]
    assert generate(carrying, *(part for text in texts for part in ("--stop", text))) == 0
    options = [lm_train.options_of(lm_train.Arguments(separator=text)) for text in texts]
    separators = [option.removeprefix("--data.separator=") for (option,) in options]
    assert separators == ["\n\n", "a\tb", r"\n", r"\d", "\n"]
    assert seen == [[separator.encode() for separator in separators]]
    assert lm_train.options_of(lm_train.Arguments()) == []
    for command, option in ((lm_generate, "--stop"), (lm_train, "--separator")):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        after = capsys.readouterr().out.partition(option)[2]
        assert r"\n, \t, \r and \\ are understood" in " ".join(after.replace("│", " ").split())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_shows_the_text(encoding, carrying, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    monkeypatch.setattr(sys, "stdout", terminal)
    pieces = "\u00fc\u2026".encode()
    monkeypatch.setattr(lm_generate, "continuation", lambda *_, **__: iter([pieces, pieces[:1]]))
    assert generate(carrying, "--prompt", "\u2026\udcff") == 0
    shown = terminal.buffer.getvalue().decode(encoding)
    assert (
        shown
        == {
            "ascii": "\\u2026\\udcff\\xfc\\u2026\\ufffd\n",
            "latin-1": "\\u2026\\udcff\u00fc\\u2026\\ufffd\n",
            "utf-8": "\u2026\\udcff\u00fc\u2026\ufffd\n",
        }[encoding]
    )


def test_bytes_of_the_prompt_reach_the_model_as_they_came(carrying, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        lm_generate, "continuation", lambda _, prompt, **__: seen.append(prompt) or iter(())
    )
    assert generate(carrying, "--prompt", b"\xff\xc3\xbc".decode("utf-8", "surrogateescape")) == 0
    assert seen == [b"\xff\xc3\xbc"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (lm_generate, ["--seed", "9" * 20], "seed=99999999999999999999 must be in [0, 2**32)"),
        (lm_generate, ["--seed", "-1"], "seed=-1 must be in [0, 2**32)"),
        (lm_generate, ["--length", "0"], "length=0 must be positive"),
        (lm_generate, ["--max-length", "0"], "max_length=0 must be positive"),
        (lm_generate, ["--temperature", "nan"], "temperature=nan must be"),
        (lm_generate, ["--temperature", "-1"], "temperature=-1.0 must be"),
        (lm_generate, ["--top-k", "0"], "top_k=0 must be"),
        (lm_generate, ["--top-p", "2"], "top_p=2.0 must be"),
        (lm_generate, ["--stop", ""], "--stop '' must have at least one character"),
        (lm_eval, ["--chunk", "0"], "chunk=0 must be positive"),
        (lm_eval, ["--context", "0"], "context=0 must be positive"),
        (lm_eval, ["--batch-size", "0"], "batch_size=0 must be positive"),
    ],
)
def test_values_out_of_range_are_named_before_anything_is_read(command, arguments, message, capsys):
    data = ["--data", "nowhere.txt"] if command is lm_eval else []
    assert command.main(["--checkpoint", "nowhere", *data, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.full
def test_a_cache_that_is_too_small_is_named(attending, carrying, capsys):
    more = ["--prompt", "0123456789", "--length", "20", "--max-length", "30"]
    assert generate(attending, *more) == 1
    error = capsys.readouterr().err
    assert "max_length=30 is too small" in error
    assert "use max_length=31 or more" in error
    assert generate(carrying, *more) == 0  # a state of a fixed size has room for everything
    capsys.readouterr()
    assert generate(attending, *more[:-1], "31") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixer", "s6"], "choose one of attention,"),
        (["--mixer", "hydra"], "mixer='hydra' sees the tokens"),
        (["--mixer", "s5", "--preset", "x"], "choose one of tiny, cpu, small"),
        ([], "needs --data and --mixer"),
        (["--mixer", "s5", "--set", "train.x=1"], "--train.x=1"),
        (["--mixer", "s5", "--steps", "0"], "steps=0"),
        (["--mixer", "s5", "--ema-decay", "1"], "ema_decay=1.0 must be in (0, 1)"),
        (["--mixer", "s5", "--set", "data.validation=2"], "validation=2.0 must be in (0, 1)"),
        (["--mixer", "s5", "--model.vocabulary-size", "256"], "vocabulary_size=256 is too small"),
        (["--mixer", "s5", "--set", "mixer=gla"], "--mixer"),
        (["--resume"], "--resume needs the --run-dir"),
        (["--resume", "--run-dir", "nowhere"], "not a run directory"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, folder, capsys):
    assert lm_train.main(["--data", str(folder / "story.txt"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_what_cannot_be_trained_says_why_and_leaves_no_run(folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    for path, message in (("none.txt", "cannot be read"), ("empty.txt", "holds no text")):
        run = ["--run-dir", str(tmp_path / "run"), "--results-dir", str(tmp_path)]
        assert lm_train.main(["--data", str(tmp_path / path), "--mixer", "s5", *run]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert path in error
    for mixer, message in (("attention", "cache of mixer='attention' grows"),
                           ("s4", "mixer='s4' takes one document a row")):  # fmt: skip
        assert train(folder, f"refused-{mixer}", mixer, "--carry-state") == 1
        assert message in capsys.readouterr().err
        assert not (folder / f"refused-{mixer}").exists()
    assert train(folder, "short", "s5", "--set", "data.length=5000") == 1
    assert "use a longer text, or smaller values" in capsys.readouterr().err


def test_a_run_of_another_experiment_or_of_another_config_is_refused(carrying, tmp_path, capsys):
    assert generate(tmp_path) == 2
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"task": "listops"}')
    assert generate(tmp_path) == 1
    assert "is not a run of `seqmodels lm train`" in capsys.readouterr().err
    run = shutil.copytree(carrying, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["train"]["weight_decay"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    assert generate(run) == 1
    assert "train.weight_decay=0.5 (saved: 0.1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "example"),
    [
        (lm_train, "--carry-state --ema-decay 0.999"),
        (lm_eval, "experiments.lm.eval --checkpoint"),
        (lm_generate, '--prompt "ROMEO:"'),
    ],
)
def test_help_teaches(command, example, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # examples stay in one line
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    assert example in capsys.readouterr().out


@pytest.mark.full
def test_documents_in_pieces_of_many_lengths(folder, tmp_path, capsys):
    """Dataset decomposition: the lines of the story, a killed run and one that was not."""
    options = ["--separator", " beer.", "--data.decompose", "grow_p2", "--data.shortest", "8"]
    assert train(folder, "pieces", "s5", *options) == 0
    run = folder / "pieces"
    config = result_of(run)["config"]
    assert (config["data"]["decompose"], config["data"]["shortest"]) == ("grow_p2", 8)
    assert (folder / "results" / "s5-tiny-grow_p2-seed0.json").exists()
    again = shutil.copytree(run, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(again / "checkpoints" / str(step))
    arguments = ["--resume", "--run-dir", str(again), "--results-dir", str(tmp_path / "results")]
    assert lm_train.main([*arguments, "--no-progress"]) == 0
    trained = [load_trained(path / "checkpoints" / "6").variables for path in (run, again)]
    jax.tree.map(np.testing.assert_array_equal, *trained)
    capsys.readouterr()
    assert train(folder, "both", "s5", *options, "--carry-state") == 2
    assert "take carry_state=False" in capsys.readouterr().err
    assert train(folder, "odd", "s5", *options, "--data.length", "48") == 2
    assert "length=48 must be a power of two" in capsys.readouterr().err


def test_bytes_that_are_hidden(folder, capsys):
    """--objective mlm: what says no next byte is not asked for it."""
    hidden = folder / "hidden"
    assert train(folder, "hidden", "monarch", "--objective", "mlm") == 0
    assert "of the predicted bytes correct" in capsys.readouterr().out
    result = result_of(hidden)
    assert (result["objective"], result["bits_per_byte"]) == ("mlm", None)
    assert result["config"]["model"]["backbone"]["mixers"][0]["bidirectional"]
    assert (folder / "results" / "monarch-tiny-mlm-seed0.json").exists()
    assert evaluate(hidden, folder / "story.txt") == 1
    assert "a model of objective='mlm' cannot be evaluated byte by byte" in capsys.readouterr().err
    assert generate(hidden) == 1
    assert "cannot be continued" in capsys.readouterr().err
    assert lm_train.main(["--resume", "--run-dir", str(hidden), "--objective", "next"]) == 2
    assert "has mlm" in capsys.readouterr().err
    assert train(folder, "refused", "s5", "--objective", "mlm", "--carry-state") == 2
    assert "objective='mlm' sees both sides" in capsys.readouterr().err


@pytest.mark.full
def test_bytes_behind_a_prefix(folder, capsys):
    behind = folder / "behind"
    assert train(folder, "behind", "jrt", "--objective", "prefix") == 0
    assert result_of(behind)["config"]["model"]["backbone"]["mixers"][0]["prefix"] == 16
    assert generate(behind, "--prompt", "the end of", "--length", "4") == 0


def test_objectives_that_a_mixer_cannot_have(folder, capsys):
    for mixer, objective, message in (
        ("jrt", "next", "mixer='jrt' sees the tokens that a language model predicts"),
        ("gla", "prefix", "mixer='gla' reads no prefix"),
    ):
        assert train(folder, f"refused-{mixer}", mixer, "--objective", objective) == 2
        assert message in capsys.readouterr().err
