"""The table of mixers: equal parameters, what is left out, rows that are kept."""

import json

import jax
import pytest

from experiments.lm import presets, table
from experiments.lm.presets import PRESETS, ExperimentConfig, experiment
from experiments.run import UsageError
from seqmodels.config import from_dict, to_dict
from seqmodels.mixers import REGISTRY
from tests.tiers import one_of_many

LEFT_OUT = "bidirectional"
CAUSAL = [name for name in REGISTRY if name not in {LEFT_OUT, *table.OBJECTIVES}]
LETTERS = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)


@pytest.mark.parametrize(
    "mixer", one_of_many([*CAUSAL, *table.OBJECTIVES], ["mamba", "gated_deltanet", "scout"])
)
def test_every_mixer_has_the_same_number_of_parameters(mixer):
    size = table.size_of(mixer)
    count = presets.parameters(presets.language_model(mixer, size, table.objective_of(mixer)))
    assert abs(count / table.PARAMETERS - 1) < 0.03
    assert 1 < size.mlp / size.width < 3


@pytest.mark.parametrize("preset", PRESETS)
def test_every_mixer_is_a_causal_preset_or_is_refused(preset):
    for mixer in CAUSAL:
        config = experiment(mixer, preset, seed=3)
        assert from_dict(ExperimentConfig, to_dict(config)) == config
        assert all(part.causal for part in config.model.backbone.mixers)
        assert (config.train.seed, config.train.select) == (3, "loss")
    for mixer in (LEFT_OUT, *table.OBJECTIVES):
        with pytest.raises(UsageError, match=f"mixer='{mixer}' sees the tokens that"):
            experiment(mixer, preset)


def test_jrt_predicts_the_second_half_of_a_row():
    config = table.config_of("jrt", table.Arguments(length=64))
    (mixer,) = config.model.backbone.mixers
    assert (config.objective, mixer.prefix) == ("prefix", 32)


def test_a_mixer_of_both_sides_counts_hidden_bytes_and_its_row_as_state():
    config = table.config_of("orchid", table.Arguments(length=64))
    assert config.objective == "mlm"
    backbone = config.model.backbone
    assert presets.state_bytes(config.model, 64) == table.LAYERS * 2 * 64 * backbone.width
    assert table.name_of("orchid") == "orchid (hidden bytes)"
    assert table.name_of("gla") == "gla"


def test_state_bytes_of_states_and_of_caches():
    config = experiment("attention", "cpu")
    size = presets.SIZES["cpu"]
    # Keys and values in bfloat16, position and segment.
    expected = size.layers * (2 * 1000 * size.width * 2 + 8)
    assert presets.state_bytes(config.model, 1000) == expected
    state = experiment("gla", "cpu")
    assert presets.state_bytes(state.model, 256) == presets.state_bytes(state.model, 65_536)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table of two rows, made in two commands."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "text.txt").write_text(LETTERS)
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        patch.setattr(table, "PARAMETERS", 100_000)
        patch.setattr(table, "LAYERS", 1)
        names = ("s5", *table.OBJECTIVES, LEFT_OUT)
        patch.setattr(table, "REGISTRY", {name: REGISTRY[name] for name in names})
        assert table.main([*command(folder), "--mixers", "sliding_window"]) == 0
        first_row = read(folder)["rows"]["sliding_window"]
        assert table.main(command(folder)) == 0
        assert read(folder)["rows"]["sliding_window"] == first_row
        assert table.main([*command(folder), "--speed"]) == 0
    return folder


def command(folder, steps=3):
    return [
        "--data", str(folder / "text.txt"), "--runs-dir", str(folder / "runs"), "--results-dir",
        str(folder / "results"), "--steps", str(steps), "--batch-size", "2", "--length", "16",
        "--validation", "0.1", "--no-progress",
    ]  # fmt: skip


def read(folder):
    return json.loads((folder / "results" / "mixers.json").read_text())


@pytest.mark.full
def test_rows_are_kept_and_added(made):
    result = read(made)
    assert set(result["rows"]) == {"s5", *table.OBJECTIVES, "sliding_window"}
    assert result["left_out"].keys() == {LEFT_OUT}
    for row in result["rows"].values():
        assert row["bits_per_byte"] > 0
        assert row["tokens"] == result["settings"]["tokens"] == 3 * 2 * 16
        assert abs(row["parameters"] / 100_000 - 1) < 0.03
        assert row["tokens_per_second"] > 0
        assert {"commit", "versions", "device", "cpu"} <= row["environment"].keys()
    assert len(result["settings"]["data_sha256"]) == 64
    assert str(made) not in json.dumps(result)
    assert (made / "results" / "mixers.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.full
def test_the_table_says_how_small_its_budget_is_and_what_is_left_out(made, capsys):
    assert table.main(["--print-only", "--results-dir", str(made / "results")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Bits per byte after 96 tokens: a small budget" in out
    assert "mixer='bidirectional' sees the tokens" in out
    assert "sliding_window" in out


@pytest.mark.full
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "4"], "is a table of other settings"),
        (["--mixers", "s6"], "mixer='s6' is not known"),
        (["--mixers", "bidirectional"], "sees the tokens that"),
    ],
)
def test_a_wrong_command_line_is_refused(made, more, message, capsys, monkeypatch):
    monkeypatch.setattr(table, "PARAMETERS", 100_000)
    monkeypatch.setattr(table, "LAYERS", 1)
    assert table.main([*command(made), *more]) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_print_and_nothing_to_train_on(tmp_path, capsys):
    assert table.main(["--print-only", "--results-dir", str(tmp_path)]) == 1
    assert "no rows" in capsys.readouterr().err
    assert table.main(["--results-dir", str(tmp_path)]) == 2
    assert "--data is needed" in capsys.readouterr().err
    (tmp_path / "mixers.json").write_text("{}")
    assert table.main(["--print-only", "--results-dir", str(tmp_path)]) == 1
    assert "is not a table" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        table.main(["--help"])
    assert caught.value.code == 0
    assert "experiments.lm.table --data book.txt" in capsys.readouterr().out
