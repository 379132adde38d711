"""Every table at 80 columns, and every figure, from the committed results: nothing is cut."""

import json
import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments import terminal
from experiments.kernels import aot, bench
from experiments.kernels.results import Result, Target
from experiments.lm import table as lm_table
from experiments.lm import train as lm_train
from experiments.lra import plots, report, rows
from experiments.lra import train as lra_train
from experiments.lra.published import ROWS
from seqmodels.training.loop import BAR_FORMAT
from tests.experiments.legible import illegible, too_long, words

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
BENCHMARKS = [path for path in RESULTS.glob("*/*.json") if "cases" in json.loads(path.read_text())]


@pytest.fixture(autouse=True)
def _terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, instead of their files."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    return saved


def benchmark(path):
    for case in json.loads(path.read_text())["cases"]:
        bounds = {of: target.rsplit(" ", 1) for of, target in case["targets"].items()}
        targets = {of: Target(bound, float(value)) for of, (bound, value) in bounds.items()}
        del case["met"]
        yield Result(**{**case, "targets": targets})


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks(path, capsys):
    rows = list(benchmark(path))
    terminal.console().print(bench.table(rows))
    out = capsys.readouterr().out
    assert too_long(out) == []
    seen = words(out)
    for row in rows:
        assert words(f"{row.device} {row.case} {row.shape} {row.kind}") <= seen
        for of, ratio in row.ratios.items():
            number = f"{ratio:.{0 if of == 'layout copies' else 2}f}"
            assert words(f"{number} {of} {row.targets.get(of, '')}") <= seen


def test_ahead_of_time(capsys):
    cells = aot.load(RESULTS / "kernels" / "aot.json")
    now = aot.digests()
    terminal.console().print(aot.table(cells))
    out = capsys.readouterr().out
    assert too_long(out) == []
    seen = words(out)
    for key, cell in cells.items():
        assert words(f"{cell.family} {cell.shape} {cell.mode} {cell.chip}") <= seen
        stale = aot.state(key, cells, now) == aot.STALE
        assert words(aot.STALE if stale else aot.describe(cell)) <= seen


def test_mixers(capsys, figures):
    assert lm_table.main(["--print-only", "--results-dir", str(RESULTS / "lm")]) == 0
    out = capsys.readouterr().out
    assert too_long(out.rpartition("figure:")[0]) == []
    seen = words(out)
    table = lm_table.read_table(RESULTS / "lm" / "mixers.json")
    for mixer, row in table["rows"].items():
        numbers = f"{row['parameters']:,} {row['width']} {row['mlp']}"
        states = " ".join(f"{size:,}" for size in row["state_bytes"].values())
        assert words(f"{mixer} {row['bits_per_byte']:.3f} {numbers} {states}") <= seen
    lm_table.plot(lm_table.ranked(table), Path("unused.png"))
    (figure,) = figures
    assert illegible(figure) == []
    assert not figure.axes[0].patches  # bars would have to begin at zero


@pytest.mark.always("False")
@pytest.mark.parametrize("everything", [False, True])
def test_lra(everything, capsys, figures, tmp_path, monkeypatch):
    """The committed rows beside one's own: the same run again, with another accuracy."""
    own = tmp_path / "own"
    own.mkdir()
    name = "listops-s5-cpu-seed0.json"
    result = json.loads((RESULTS / "lra" / name).read_text())
    (own / name).write_text(json.dumps({**result, "test_accuracy": 0.98765}))
    monkeypatch.setattr(rows, "COMMITTED", RESULTS / "lra")
    options = ["--all-published"] if everything else []
    folders = ["--results-dir", str(RESULTS / "lra"), str(own), "--out", str(tmp_path / "page")]
    assert report.main([*folders, *options]) == 0
    out = capsys.readouterr().out
    assert too_long(out.partition("written:")[0]) == []
    seen = words(out)
    lines = [line.split() for line in out.splitlines()]
    run = ["listops", "s5", "cpu", "seed", "0"]
    assert ["committed", "55.15"] in [line[5:7] for line in lines if line[:5] == run]
    assert ["own", "98.77"] in [line[5:7] for line in lines if line[:5] == run]
    for row in ROWS:
        if everything or row.model in report.SELECTED:
            numbers = " ".join(f"{value:.2f}" for value in row.accuracies if value)
            average = "" if row.average is None else f"{row.average:.2f}"
            assert words(f"{row.model} {numbers} {average} {row.source}") <= seen
    for figure in figures:
        assert illegible(figure) == []
    shown, _ = figures  # in Markdown and HTML; the other has the tables as well
    (panel,) = (part for part in shown.subfigs if "listops" in part.get_suptitle().lower())
    dots = len(panel.axes[0].get_yticks())
    assert dots == sum(row.model in report.SELECTED for row in ROWS) + 2 + (
        sum(path.name.startswith("listops") for path in RESULTS.glob("lra/*.json")) - 1
    )
    assert not any(each.patches for each in shown.axes)  # bars would have to begin at zero


def test_ones_own_results_go_where_git_ignores_them_and_the_report_reads_them():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for arguments in (lra_train.Arguments, lm_train.Arguments):
        assert f"/{arguments.results_dir.parts[0]}/" in ignored
    assert report.Arguments.results_dir == (rows.COMMITTED, lra_train.Arguments.results_dir)
    assert ROOT / rows.COMMITTED == RESULTS / "lra"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("lra/*.json")), ids=lambda path: path.stem)
def test_learning_curves(path, figures):
    plots.learning_curve(json.loads(path.read_text()), Path("unused.png"))
    (figure,) = figures
    assert illegible(figure) == []


def test_the_progress_bar_is_not_cut():
    postfix = f"loss=0.1234, acc=0.1234, tok/s={tqdm.format_sizeof(12_345)}"
    line = tqdm.format_meter(
        38_000, 76_800, 40_000, ncols=80, bar_format=BAR_FORMAT, postfix=postfix
    )
    assert line.endswith("<11:20:42, loss=0.1234, acc=0.1234, tok/s=12.3k]")
    assert len(line) == 80


def test_a_text_is_wrapped_and_paths_stay_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    path = "runs/results/" + "a-long-name-" * 3 + ".json"
    terminal.say(f"the result, which you may want to see, is: {path}")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["the result, which you may want", "  to see, is:", f"  {path}"]


def test_the_width_is_80_where_there_is_no_terminal(monkeypatch):
    def no_terminal(*_):
        raise OSError

    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(os, "get_terminal_size", no_terminal)
    assert terminal.console().width == 80


@pytest.mark.parametrize(
    "command", [lra_train, report, lm_train, aot, bench], ids=lambda m: m.__name__
)
def test_help_fits(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert not too_long(capsys.readouterr().out)
