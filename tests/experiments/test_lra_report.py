"""The report: which rows there are, what is said of each, the forms of the page, --check."""

import dataclasses
import html.parser
import json
import re
from pathlib import Path

import pytest

from experiments.lra import check, page, report, rows
from experiments.lra import eval as lra_eval
from experiments.lra import train as lra_train
from experiments.lra.presets import experiment
from experiments.lra.published import ROWS, TASKS
from seqmodels.config import to_dict
from seqmodels.models import ClassifierConfig
from tests.experiments.test_lra_train import command
from tests.seqmodels.training.compilation import on_one_device

COMMITTED = Path(__file__).parents[2] / "experiments" / "results" / "lra"
LISTOPS = json.loads((COMMITTED / "listops-s5-cpu-seed0.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def _setting(tmp_path_factory):
    """One device is enough for the tiny batches, and one compilation for all runs."""
    with on_one_device(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run of whole rows and one of windows."""
    folder = tmp_path_factory.mktemp("lra")
    assert lra_train.main(command(folder)) == 0
    local = ["--window", "5", "--run-dir", str(folder / "local")]
    assert lra_train.main(command(folder, *local)) == 0
    return folder


def write(folder, name, changes=(), **fields):
    """The committed result with other fields; ``changes``: dotted paths within its config."""
    result = json.loads(json.dumps({**LISTOPS, **fields}))
    for path, value in dict(changes).items():
        *parents, last = path.split(".")
        node = result["config"]
        for key in parents:
            node = node[key]
        node[last] = value
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result))


def seeded(folder, seed, accuracy, window=None):
    changes = {"train.seed": seed} | ({"classifier.window": window} if window else {})
    write(folder, f"w{window}s{seed}", changes, seed=seed, test_accuracy=accuracy)


def test_windowed_rows_stand_beside_the_whole_one(tmp_path):
    for seed, accuracy, window in ((0, 0.5, None), (0, 0.3, 5), (0, 0.4, 61), (1, 0.2, 5)):
        seeded(tmp_path, seed, accuracy, window)
    found = rows.read_rows(tmp_path)
    assert len(found) == 4
    (grid,) = report.accuracies(found)
    cells = {row[0]: row[2:5] for row in grid.rows}
    assert cells == {
        "listops s5 cpu seed 0": ("50.00", "30.00", "40.00"),
        "listops s5 cpu window 5 seed 1": ("20.00", "-", "-"),  # its whole row has no file
    }


def test_a_pretrained_row_says_so_and_is_not_checked(tmp_path, capsys):
    write(tmp_path, "row", {"pretrain": {"kind": "masked", "steps": 5, "share": 0.5}})
    (row,) = rows.read_rows(tmp_path)
    assert row.label == "listops s5 cpu pretrained seed 0"
    assert report.main(["--results-dir", str(tmp_path), "--check", "row"]) == 1
    assert "began with pretraining" in capsys.readouterr().err


def test_rows_are_grouped_by_budget(tmp_path):
    for name, wall, limit in (
        ("a", 590, None),
        ("b", 630, None),
        ("c", 630, 10.0),
        ("d", 4000, None),
    ):
        write(tmp_path, name, {"train.max_minutes": limit}, wall_seconds=wall)
    budgets = {row.name: row.budget for row in rows.read_rows(tmp_path)}
    assert budgets == {"a": 10, "b": 60, "c": 10, "d": None}
    titles = [grid.title for grid in report.accuracies(rows.read_rows(tmp_path))]
    assert [re.search(r"\d+ minutes|longer", title)[0] for title in titles] == [
        "10 minutes", "60 minutes", "longer",
    ]  # fmt: skip


def test_seeds_are_averaged(tmp_path):
    for seed, accuracy in ((0, 0.5), (1, 0.6), (2, 0.7)):
        seeded(tmp_path, seed, accuracy)
    (line,) = report.spread(rows.read_rows(tmp_path))
    assert line == "listops s5 cpu: 60.00 ± 10.00 % over 3 runs, seeds 0, 1, 2."


def test_a_curve_knows_its_tokens(tmp_path):
    write(tmp_path, "a")
    (row,) = rows.read_rows(tmp_path)
    points = row.curve("eval")
    assert [point.step for point in points] == [500, 1000, 1500, 2000, 2500]
    assert points[0].tokens == 3338123  # of the training record of that step
    assert points[-1].tokens == row.result["tokens"]
    line = report.curve(row, "a")
    assert line.minutes[-1] == pytest.approx(row.minutes)
    assert line.accuracy[0] == pytest.approx(36.15)


def test_the_state_is_what_one_would_carry(tmp_path):
    """S5: P complex numbers a layer and direction; positions and documents are 8 bytes."""
    write(tmp_path, "a")
    (row,) = rows.read_rows(tmp_path)
    assert row.state_bytes == 6 * 2 * (8 * 8 + 8)
    write(tmp_path, "a", to_conv("conv61"), model="conv61")
    (row,) = rows.read_rows(tmp_path)
    assert row.state_bytes == 6 * 2 * (30 * 64 * 4 + 8)


def to_conv(model):
    config = to_dict(experiment("listops", model, "cpu"))
    return {"model": model, "classifier": config["classifier"], "train": config["train"]}


def test_only_the_published_task_is_comparable(tmp_path):
    paper = experiment("listops", "s5", "paper")
    config, steps = to_dict(paper), paper.train.steps

    def caveats(steps=steps, **data):
        changed = {**config, "data": {**config["data"], **data}}
        write(tmp_path, "a", config=changed, preset="paper", steps=steps)
        return rows.read_rows(tmp_path)[0].caveats

    assert caveats() == []
    assert "--allow-partial" in caveats(allow_partial=True)[0]
    assert caveats(steps=100) == [f"published recipe {steps} steps"]
    assert caveats(max_length=700) == ["ListOps of at most 699 tokens, not the published 2K task"]


def test_nothing_to_report(tmp_path, capsys):
    assert report.main(["--results-dir", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"test_accuracy": 2.0}, "test_accuracy=2.0"),
        ({"curve": [{"kind": "eval", "step": 1, "loss": 1.0}]}, "curve[0]: accuracy is missing"),
        ({"curve": [{"kind": "train", "step": -1, "loss": 1, "accuracy": 1}]}, "step=-1"),
        ({"seed": 3}, "its config has 0"),
        ({"tokens": "many"}, "tokens='many'"),
    ],
)
def test_a_broken_file_is_named_and_refused(fields, problem, tmp_path, capsys):
    write(tmp_path, "good")
    write(tmp_path, "broken", **fields)
    assert report.main(["--results-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "broken.json is not a result" in error
    assert problem in error
    assert not (tmp_path / "report.md").exists()


def test_an_unknown_row_names_the_nearest(capsys):
    assert report.main(["--results-dir", str(COMMITTED), "--check", "listops-s5-seed0"]) == 2
    error = capsys.readouterr().err
    assert "no row has that name; the nearest are listops-s5-cpu-seed0" in error


class Pieces(html.parser.HTMLParser):
    """Text of cells, sources of pictures, and tags that are open at the end."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.pictures, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_forms_of_a_page(capsys):
    grid = page.Grid("title", ["a b", "c"], [("x|<y>", "1"), ("z", "2")], ("a b",), "note & more")
    picture = page.Picture("p.png", b"\x89PNG", 'a "picture"')
    blocks = [page.Heading("Head"), page.Text("text"), page.Items(["one"]), picture, grid]
    assert page.to_markdown(blocks).split("\n\n") == [
        "# Head", "text", "- one", '![a "picture"](p.png)', "**title**",
        "| a b | c |\n| --- | ---: |\n| x\\|<y> | 1 |\n| z | 2 |", "note & more\n",
    ]  # fmt: skip
    pieces = Pieces(page.to_html(blocks).partition("\n")[2])
    assert pieces.open == []
    assert pieces.cells == ["a b", "c", "x|<y>", "1", "z", "2"]
    assert pieces.pictures == ["data:image/png;base64,iVBORw=="]
    page.to_terminal(blocks)
    out = capsys.readouterr().out
    assert all(word in out for word in ("Head", "text", "- one", "x|<y>", "note"))
    assert "picture" not in out


def test_published_rows_have_sources_and_averages():
    named = {row.model: row for row in ROWS}
    assert len(named) == len(ROWS)
    assert set(report.SELECTED) <= named.keys()
    assert named["Transformer"].cell("path-x") == "fail"
    assert round(named["Transformer"].average, 2) == 53.66
    assert named["S4++"].cell("path-x") == "-"
    assert named["S4++"].average is None
    assert round(named["S4D-FT"].average, 2) == 88.26
    for row in ROWS:
        assert len(row.accuracies) == len(TASKS)
        assert row.source
        assert all(row.accuracy(task) is None for task in row.not_run)
        assert all(10 <= value <= 100 for value in row.accuracies if value is not None)
        if row.reported_average is not None and None not in row.accuracies:
            assert row.average == pytest.approx(row.reported_average, abs=0.1)


@pytest.mark.full
def test_the_page_of_a_run_and_its_windows(trained, capsys):
    results = trained / "results"
    assert report.main(["--results-dir", str(results)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    whole, local = (
        json.loads((results / f"listops-s5-cpu{cut}-seed0.json").read_text())
        for cut in ("", "-window5")
    )
    assert (whole["window"], local["window"]) == (None, 5)
    assert whole["parameters"] == local["parameters"]
    figures = [f"{100 * result['test_accuracy']:.2f}" for result in (whole, local)]
    assert f"seed 0 own {figures[0]} {figures[1]} -" in out
    assert "62.15" in out  # S5 on ListOps
    assert "counts 50" in out
    assert (results / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert figures[1] in (results / "report.md").read_text()
    pieces = Pieces((results / "report.html").read_text().partition("\n")[2])
    assert pieces.open == []
    assert pieces.cells.count("S4D-FT") == 1  # all published rows, whatever is printed
    assert len(pieces.pictures) == 1


@pytest.mark.full
def test_a_row_is_reproduced_to_the_bit(trained, capsys):
    options = ["--results-dir", str(trained / "results"), "--cache-dir", str(trained / "cache")]
    for row in ("listops-s5-cpu-seed0", "listops-s5-cpu-window5-seed0"):
        assert report.main([*options, "--check", row, "--no-progress"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "trains 3 of 4 steps again" in out
        assert "2 of 2 records equal to the bit reproduced to the bit" in out


@pytest.mark.full
def test_a_row_that_says_something_else_is_found_out(trained, tmp_path, capsys):
    name = "listops-s5-cpu-seed0"
    result = json.loads((trained / "results" / f"{name}.json").read_text())
    result["curve"][1]["loss"] += 1.0
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    options = ["--results-dir", str(tmp_path), "--cache-dir", str(trained / "cache")]
    assert report.main([*options, "--check", name, "--no-progress"]) == 1
    assert "step 3" in capsys.readouterr().err
    result["data"]["digest"] = "0"
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert report.main([*options, "--check", name, "--no-progress"]) == 1
    assert "the data are not those" in capsys.readouterr().err


def run_of(loss=1.0, accuracy=0.5, **environment):
    same = {"versions": {"jax": "1"}, "commit": "a", "dirty": False, "device": "cpu"}
    curve = [
        {"kind": "train", "step": 2, "loss": 2.0, "accuracy": 0.1},
        {"kind": "eval", "step": 3, "loss": loss, "accuracy": accuracy},
        {"kind": "eval", "step": 6, "loss": accuracy, "accuracy": 0.9},
    ]
    return {"environment": same | environment, "curve": curve}


def test_other_versions_are_compared_within_a_tolerance(capsys):
    check.compare(run_of(), run_of(), 3)
    assert "reproduced to the bit" in capsys.readouterr().out
    with pytest.raises(ValueError, match="in the same environment"):
        check.compare(run_of(), run_of(loss=1.0 + 1e-12), 3)
    check.compare(run_of(), run_of(loss=1.04, accuracy=0.48, commit="b"), 3)
    assert "loss differs by 4.00 %, accuracy by 0.0200; not to the bit, other: commit" in " ".join(
        capsys.readouterr().out.split()
    )
    for worse in ({"loss": 1.06}, {"accuracy": 0.46}, {"loss": "nan"}):
        with pytest.raises(ValueError, match="other: versions"):
            check.compare(run_of(), run_of(**worse, versions={"jax": "2"}), 3)


@pytest.mark.full
def test_a_model_of_whole_rows_is_evaluated_on_windows(trained, capsys):
    options = ["--checkpoint", str(trained / "run"), "--no-progress"]
    assert lra_eval.main([*options, "--window", "24"]) == 0  # a window as long as the row
    whole = json.loads((trained / "run" / "result.json").read_text())
    out = capsys.readouterr().out
    assert f"test accuracy {whole['test_accuracy']:.6f}" in out
    assert "equal to the recorded" not in out
    assert lra_eval.main([*options, "--window", "0"]) == 2
    assert "window=0" in capsys.readouterr().err


def test_windows_do_not_go_with_rows_split_over_devices():
    config = experiment("listops", "s5", "cpu")
    classifier = dataclasses.replace(config.classifier, window=5)
    mesh = dataclasses.replace(config.train.mesh, seq=2)
    train = dataclasses.replace(config.train, mesh=mesh)
    with pytest.raises(ValueError, match=r"take train\.mesh\.seq=1"):
        dataclasses.replace(config, classifier=classifier, train=train)
    assert ClassifierConfig.__dataclass_fields__["window"].default is None
