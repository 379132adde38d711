"""The command that prepares data: what it prints, draws and refuses."""

import pytest
from matplotlib.figure import Figure

from experiments.lra import data as lra_data
from seqmodels.data.lra import TASKS
from tests.seqmodels.data.lra import original_files as original

FILES = {
    "image": original.cifar(),
    "cifar": original.cifar(),
    "pmnist": original.mnist(),
    "retrieval": original.pairs(),
    "speech": original.digits(),
}


def command(folder, task, *more):
    options = ["--cache-dir", str(folder / "cache"), "--no-progress"]
    return ["--task", task, *options, "--picture", str(folder / "page.png"), *more]


def prepare(folder, task, files, *more):
    data = original.write(folder / "data", files)
    more = ("--data-dir", str(data), "--allow-partial", *more)
    return lra_data.main(command(folder, task, *more))


@pytest.fixture
def figures(monkeypatch):
    """What was drawn."""
    seen, save = [], Figure.savefig

    def saved(figure, *arguments, **options):
        seen.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return seen


@pytest.mark.parametrize("task", FILES)
def test_counts_and_a_page_of_samples(task, tmp_path, capsys, figures):
    more = () if task in ("retrieval", "speech") else ("--validation", "3")
    assert prepare(tmp_path, task, FILES[task], *more) == 0
    out = capsys.readouterr().out
    counts = {"retrieval": (12, 4, 4), "speech": (20, 20, 20), "pmnist": (17, 3, 5)}
    words = [line.split() for line in out.splitlines()]
    lines = {found[0]: found[1] for found in words if len(found) > 1}
    expected = counts.get(task, (17, 3, 4))
    assert [lines[split] for split in ("train", "validation", "test")] == list(map(str, expected))
    assert max(map(len, out.split("samples:")[0].splitlines())) <= 80
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = figures
    drawn = [axes for axes in figure.axes if axes.get_title(loc="left")]
    images = sum(len(axes.images) for axes in drawn)
    assert images == (17 if task in ("image", "cifar", "pmnist") else 0)
    assert len(drawn) == (17 if images else 4)
    assert all(axes.images or axes.lines or axes.texts for axes in drawn)


def test_what_is_generated_needs_no_files(tmp_path, capsys):
    counts = ["--train", "20", "--validation", "2", "--test", "3"]
    assert lra_data.main(command(tmp_path, "listops", *counts)) == 0
    assert "generated" in capsys.readouterr().out


@pytest.mark.parametrize(
    "task", sorted(set(TASKS) - {"listops", "pathfinder", "path-x", "path-256"})
)
def test_without_files_it_says_what_to_get_and_from_where(task, tmp_path, capsys):
    assert lra_data.main(command(tmp_path, task)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "get " in error
    assert "http" in error
    assert "pass " in error
    assert not (tmp_path / "page.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--task", "x"], 2, "choose one of listops, text, retrieval, image"),
        (["--task", "mnist", "--train", "3"], 2, "Unrecognized options: --train"),
        (["--task", "path-x", "--test", "-1"], 2, "test=-1 must be at least 0"),
        (["--task", "mnist", "--data-dir", "nowhere"], 1, "nowhere' does not exist; get"),
    ],
)
def test_bad_command_lines(arguments, code, message, tmp_path, capsys):
    assert lra_data.main([*arguments, "--cache-dir", str(tmp_path)]) == code
    assert message in capsys.readouterr().err
