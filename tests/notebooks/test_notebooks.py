"""The notebooks as text, and what their runner says of a cell that fails.

`make notebooks` executes them.
"""

import ast
import re
from pathlib import Path

import pytest

from experiments import notebooks
from experiments.command_line import UsageError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = notebooks.find(notebooks.SOURCES)
MARK = re.compile(r"^# %%( \[markdown\])?$")


def cells(path):
    """`(kind, lines)` of each cell; the header is the first."""
    found = [("header", [])]
    for line in path.read_text(encoding="utf-8").splitlines():
        if mark := MARK.match(line):
            found.append(("markdown" if mark[1] else "code", []))
        else:
            found[-1][1].append(line)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_text_that_a_reader_can_follow(path):
    header, *parts = cells(path)
    assert all(line.startswith("# ") for line in header[1] if line)
    kind, first = parts[0]
    assert kind == "markdown"
    assert re.match(r"# # \S", first[0]), f"{path.name} does not begin with a title"
    assert "second" in " ".join(first), f"{path.name} does not say how long it takes"
    for kind, lines in parts:
        assert any(lines), f"{path.name} has an empty cell"
        if kind == "markdown":
            wrong = [line for line in lines if line and not line.startswith("#")]
            assert not wrong, f"{path.name}: in markdown, but no comment: {wrong[0]}"
        else:
            assert len(lines) < 80, f"{path.name}: a cell of {len(lines)} lines"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_and_no_machine(path):
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if not node.attr.startswith("__") else []
        private = [name for name in names for part in name.split(".") if part.startswith("_")]
        assert not private, f"{path.name}:{node.lineno}: {private[0]} is private"
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|mnt)/", text)
    for page in re.findall(r"\]\(([\w/]+)\.ipynb\)", text):
        assert page in {other.stem for other in NOTEBOOKS}, f"{path.name} links to {page}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_jupyter(path):
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(path, fmt=notebooks.FORMAT)
    kinds = [(cell.cell_type, bool(cell.get("outputs"))) for cell in notebook.cells]
    assert kinds == [(kind, False) for kind, _ in cells(path)[1:]]


def test_a_cell_that_fails_is_named(tmp_path, capsys):
    pytest.importorskip("nbclient")
    pytest.importorskip("jupytext")
    (tmp_path / "broken.py").write_text(
        "# %% [markdown]\n# # Title\n\n# %%\nx = 1\n\n# %%\n\nwrong = x / 0\nprint(wrong)\n"
    )
    out = tmp_path / "out"
    code = notebooks.main(["--sources", str(tmp_path), "--out", str(out)])
    assert code == 1
    said = capsys.readouterr().err.strip()
    assert (
        said == "error: broken.py, code cell 2 (wrong = x / 0): ZeroDivisionError: division by zero"
    )
    assert not list(out.iterdir())


def test_notebooks_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--sources .* there are no notebooks"):
        notebooks.find(tmp_path)
    with pytest.raises(UsageError, match=r"--only turo: no such notebook; choose among .*tour"):
        notebooks.find(notebooks.SOURCES, ("turo",))


def test_the_index_lists_every_notebook():
    text = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(\.\./notebooks/(\w+)\.py\)", text)
    assert sorted(listed) == [path.stem for path in NOTEBOOKS]
