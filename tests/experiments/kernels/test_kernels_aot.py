"""The table of what compiles where: what passed, what is done again, what README shows."""

import dataclasses
import json
import types

import jax.numpy as jnp
import pytest
import rich.console

from experiments.kernels import aot as table
from experiments.kernels.aot import FAILED, NOT_RUN, PASSED, AotConfig, Cell, Key
from pallas_kernels.tools import aot

QUIET = rich.console.Console(quiet=True)
CELL = Cell("linear_scan", "odd", "forward", "v5e", PASSED, {}, None, "0", "c", False, 1.0)


def test_readme_shows_what_the_committed_results_give():
    text = (table.REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert table.with_matrix(text, table.load(table.RESULTS).values()) == text


def test_every_family_that_exists_is_in_the_table():
    families = table.REPOSITORY.glob("pallas_kernels/*/shapes.py")
    committed = {cell.family for cell in table.load(table.RESULTS).values()}
    assert committed <= set(table.FAMILIES) <= {path.parent.name for path in families}


def test_committed_cells_that_passed_have_figures_or_say_why_not():
    for cell in table.load(table.RESULTS).values():
        if cell.chip in aot.TPUS and cell.outcome == PASSED:
            assert cell.reason or cell.figures["times_floor"] >= 0.99
        if cell.chip in aot.GPUS and cell.outcome == PASSED:
            assert cell.reason or 0 < cell.figures["registers"] <= 255


def test_matrix_counts_named_shapes_and_calls_nothing_run_that_was_compiled(monkeypatch):
    monkeypatch.setattr(table, "FAMILIES", ("linear_scan",))
    shapes = types.SimpleNamespace(SHAPES=("odd", "short"))
    monkeypatch.setattr(table, "_shapes", lambda family: shapes)
    cells = [
        CELL,
        dataclasses.replace(CELL, mode="forward+backward"),
        dataclasses.replace(CELL, shape="short", outcome=FAILED),
        dataclasses.replace(CELL, shape="gone", outcome=FAILED),
        dataclasses.replace(CELL, chip="cpu", mode="forward+backward"),
    ]
    header, _, row = table.matrix(cells).splitlines()
    names, values = ([x.strip() for x in line.split("|")[1:-1]] for line in (header, row))
    ours = dict(zip(names, values, strict=True))
    assert ours["family"] == "`linear_scan`"
    assert ours["CPU, ran"] == "1 passed, 1 not run"
    assert ours["v5e, compiled"] == "2 passed, 1 failed, 1 not run"
    assert ours["h100, compiled"] == ours["TPU, ran"] == ours["GPU, ran"] == NOT_RUN


def test_matrix_goes_between_the_markers():
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    new = table.with_matrix(text, [CELL])
    assert new.startswith(f"before\n{table.BEGIN}\n| family |")
    assert new.endswith(f"|\n{table.END}\nafter\n")
    assert table.with_matrix(new, [CELL]) == new
    with pytest.raises(ValueError, match="needs the two lines"):
        table.with_matrix("nothing here", [CELL])


def test_answers_become_outcomes():
    forward = aot.Kernel("x_forward", 40, stack=0, spill_stores=0, spill_loads=4, shared=0)
    backward = dataclasses.replace(forward, name="x_backward", registers=32, spill_stores=8)
    outcome, figures, reason = table.judge([forward, backward])
    assert (outcome, reason) == (PASSED, None)
    expected = {"registers": 40, "spilled_bytes": 16, "forward_spilled_bytes": 4, "kernels": 2}
    assert figures == expected
    assert table.judge(None) == (PASSED, {}, None)
    assert table.judge(ImportError("no libtpu")) == (NOT_RUN, {}, "no libtpu")
    assert table.judge(RuntimeError("trace\nMosaic: no"))[::2] == (FAILED, "Mosaic: no")
    assert table.judge(ValueError("a loop"))[::2] == (PASSED, "a loop")


def test_a_run_is_merged_and_does_only_what_is_not_known(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "aot.json"
    asked = []
    monkeypatch.setattr(table, "_run_here", lambda family, key: asked.append(key))
    config = AotConfig(family=("linear_scan",), chip=("cpu",), shape=("odd",), output=path)
    table.run(config, QUIET)
    assert [key.mode for key in asked] == ["forward+backward"]
    table.run(dataclasses.replace(config, shape=("odd", "short")), QUIET)
    assert asked[1:] == [Key("linear_scan", "short", "forward+backward", "cpu")]
    record = json.loads(path.read_text())
    assert {"config", "commit", "versions", "wall_s", "cells"} <= record.keys()
    assert len(record["cells"]) == 2
    monkeypatch.setattr(table, "sources", lambda family: "changed")
    table.run(config, QUIET)
    assert len(asked) == 3
    table.run(dataclasses.replace(config, again=True), QUIET)
    assert len(asked) == 4


def test_cells_of_three_chips(tmp_path, monkeypatch):
    chips = ("cpu", "v5e", "h100")
    monkeypatch.setattr(
        aot, "missing", lambda chip: "pip install something" if chip == "h100" else None
    )
    config = AotConfig(("causal_conv1d",), chips, ("one-tap",), output=tmp_path / "aot.json")
    cells = {key.chip: cell for key, cell in table.run(config, QUIET).items()}
    assert table.describe(cells["cpu"]) == "ran"
    assert cells["v5e"].figures["times_floor"] > 1
    assert (cells["h100"].outcome, cells["h100"].reason) == (NOT_RUN, "pip install something")
    console = rich.console.Console(record=True, width=200)
    console.print(table.table(cells.values()))
    assert "one-tap" in console.export_text()


def test_the_portable_path_runs_and_a_failure_is_a_cell(monkeypatch):
    key = Key("causal_conv1d", "odd-packed", "forward+backward", "cpu")
    assert table._run_here("causal_conv1d", key) is None
    monkeypatch.setattr(jnp, "zeros", lambda *_: 1 / 0)
    assert table.judge(table._run_here("causal_conv1d", key))[::2] == (FAILED, "division by zero")


def test_forward_alone_only_where_it_is_held_to_a_speed():
    config = AotConfig(family=("linear_scan",), chip=("v5e", "v6e", "h100"), shape=("odd",))
    asked = [(key.chip, key.mode) for key in table.wanted(config, {})]
    both = ("v5e", "forward"), ("v5e", "forward+backward")
    assert asked == [*both, ("v6e", "forward+backward"), ("h100", "forward+backward")]


@pytest.mark.parametrize("bad", [{"family": ("gpt",)}, {"chip": ("v4",)}, {"mode": ("sideways",)}])
def test_unknown_names_are_refused(bad):
    with pytest.raises(ValueError, match="is unknown; one of"):
        AotConfig(**bad)


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="shape='gpt' is in none of linear_scan"):
        table.wanted(AotConfig(family=("linear_scan",), shape=("gpt",)), {})
