"""The table of what compiles where: what passed, what is done again, what the matrix shows."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest
import rich.console

from experiments import places
from experiments.kernels import aot as table
from experiments.kernels.aot import FAILED, NOT_RUN, PASSED, AotConfig, Cell, Key
from pallas_kernels.tools import aot
from pallas_kernels.tools.families import FAMILIES, TABULATED

OPERATORS = (places.ROOT / "docs" / "operators" / "index.md").read_text(encoding="utf-8")
QUIET = rich.console.Console(quiet=True)
CELL = Cell("linear_scan", "odd", "forward", "v5e", PASSED, {}, None, "0", "c", False, 1.0)


def test_every_family_that_exists_is_in_the_tables_and_has_a_benchmark():
    patterns = ("pallas_kernels/*/shapes.py", "experiments/kernels/*.py")
    shapes, modules = (set(places.ROOT.glob(pattern)) for pattern in patterns)
    committed = {cell.family for cell in table.load(table.RESULTS).values()}
    assert committed == set(TABULATED) == {path.parent.name for path in shapes}
    assert set(TABULATED) <= {path.stem for path in modules}
    for name, family in FAMILIES.items():
        kernels = "TPU, GPU" if family.has_kernels else "none"
        link = rf"\[`{name}`\]\({name}\.md\)"
        assert re.search(rf"^\| {link} \| .* \| {kernels} \|$", OPERATORS, re.MULTILINE)


def test_committed_cells_that_passed_have_figures_or_say_why_not():
    for cell in table.load(table.RESULTS).values():
        if cell.chip in aot.TPUS and cell.outcome == PASSED:
            assert cell.reason or cell.figures["times_floor"] >= 0.99
        if cell.chip in aot.GPUS and cell.outcome == PASSED:
            assert cell.reason or 0 < cell.figures["registers"] <= 255


@pytest.fixture
def two_shapes(monkeypatch):
    """The table of one family with the shapes odd and short, whose sources have digest "0"."""
    family = TABULATED["linear_scan"]
    shapes = {name: family.shapes[name] for name in ("odd", "short")}
    known = {"linear_scan": dataclasses.replace(family, shapes=shapes)}
    monkeypatch.setattr(table, "TABULATED", known)
    now = dict.fromkeys((("linear_scan", name) for name in shapes), "0")
    monkeypatch.setattr(table, "digests", lambda families=(): now)


def at(key, **changes):
    return dataclasses.replace(CELL, **key._asdict(), **changes)


def by_key(*cells):
    return {cell.key: cell for cell in cells}


def test_matrix_counts_named_shapes_and_calls_nothing_run_that_was_compiled(two_shapes):
    cells = by_key(
        CELL,
        dataclasses.replace(CELL, mode="forward+backward"),
        dataclasses.replace(CELL, shape="short", outcome=FAILED),
        dataclasses.replace(CELL, shape="gone", outcome=FAILED),
        dataclasses.replace(CELL, chip="cpu", mode="forward+backward"),
        dataclasses.replace(CELL, chip="v6e", mode="forward+backward", sources="old"),
    )
    header, _, row = table.matrix(cells).splitlines()
    names, values = ([x.strip() for x in line.split("|")[1:-1]] for line in (header, row))
    ours = dict(zip(names, values, strict=True))
    assert ours["family"] == "`linear_scan`"
    assert ours["CPU, ran"] == "1 passed, 1 not run"
    assert ours["v5e, compiled"] == "2 passed, 1 failed, 1 not run"
    assert ours["v6e, compiled"] == "1 stale, 1 not run"
    assert ours["h100, compiled"] == ours["TPU, ran"] == ours["GPU, ran"] == NOT_RUN


def test_check_names_what_is_stale_failed_or_missing(two_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "aot.json"
    config = AotConfig(chip=("cpu", "v5e"), output=path)
    assert table.check(config) == [
        "missing: 6 cells",
        "  linear_scan on cpu, v5e forward, v5e: all shapes",
    ]
    cells = by_key(*map(at, table.asked(config)))
    table.save(path, cells, config, 1.0)
    assert table.check(config) == []
    assert table.main(["--chip", "cpu", "v5e", "--output", str(path), "--check"]) == 0
    bad = [
        at(Key("linear_scan", "odd", "forward", "v5e"), sources="old"),
        at(Key("linear_scan", "odd", "forward+backward", "v5e"), outcome=FAILED),
        at(Key("linear_scan", "short", "forward+backward", "cpu"), outcome=NOT_RUN),
    ]
    table.save(path, cells | by_key(*bad), config, 1.0)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        table.main(["--chip", "cpu", "v5e", "--output", str(path), "--check"])
    assert exit.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "stale: 1 cells",
        "  linear_scan on v5e forward: odd",
        "failed: 1 cells",
        "  linear_scan on v5e: odd",
        "not run: 1 cells",
        "  linear_scan on cpu: short",
    ]
    everything = table.check(AotConfig(output=tmp_path / "none"))
    assert everything[1:] == ["  linear_scan on every chip: all shapes"]


def test_a_stale_cell_reads_stale_in_the_table(two_shapes):
    cells = by_key(CELL, dataclasses.replace(CELL, shape="short", sources="old", outcome=FAILED))
    console = rich.console.Console(record=True, width=100)
    console.print(table.table(cells))
    text = console.export_text()
    assert "v5e: stale" in text
    assert "v5e: compiled, cost unknown" in text
    assert FAILED not in text


def test_a_shape_has_a_digest_of_its_arguments_and_of_the_code_of_its_op(monkeypatch):
    family = TABULATED["linear_scan"]
    before = table.digests(["linear_scan"])
    shapes = dict(family.shapes)
    shapes["odd"] = dataclasses.replace(shapes["odd"], reverse=True)
    shapes["short"] = dataclasses.replace(shapes["short"], source="elsewhere")
    with monkeypatch.context() as patch:
        known = {"linear_scan": dataclasses.replace(family, shapes=shapes)}
        patch.setattr(table, "TABULATED", known)
        after = table.digests(["linear_scan"])
    assert {key for key in before if before[key] != after[key]} == {("linear_scan", "odd")}
    monkeypatch.setattr(table.code, "digest", lambda modules: "another")
    changed = table.digests(["linear_scan"])
    assert not {key for key in before if before[key] == changed[key]}


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
    changed = {("linear_scan", name): "changed" for name in TABULATED["linear_scan"].shapes}
    monkeypatch.setattr(table, "digests", lambda families=(): changed)
    monkeypatch.setattr(table, "fingerprint", lambda key: "another")
    table.run(config, QUIET)
    assert len(asked) == 3
    table.run(dataclasses.replace(config, again=True), QUIET)
    assert len(asked) == 4


def test_a_cell_outlives_a_change_of_code_that_leaves_its_program_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(table, "_run_here", lambda family, key: asked.append(key))
    config = AotConfig(("linear_scan",), ("cpu",), ("odd", "short"), output=tmp_path / "aot.json")
    before = table.run(config, QUIET)
    changed = {("linear_scan", name): "changed" for name in FAMILIES["linear_scan"].shapes}
    monkeypatch.setattr(table, "digests", lambda families=(): changed)
    monkeypatch.setattr(
        table, "fingerprint", lambda key: before[key].program if key.shape == "odd" else "another"
    )
    after = table.run(config, QUIET)
    assert [key.shape for key in asked] == ["odd", "short", "short"]
    assert {cell.sources for cell in after.values()} == {"changed"}
    odd = Key("linear_scan", "odd", "forward+backward", "cpu")
    assert dataclasses.replace(after[odd], sources=before[odd].sources) == before[odd]


@pytest.mark.full
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
    console.print(table.table(by_key(*cells.values())))
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
    with pytest.raises(ValueError, match=r"is not known.*choose one of"):
        AotConfig(**bad)


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="shape='gpt' is in none of linear_scan"):
        table.wanted(AotConfig(family=("linear_scan",), shape=("gpt",)), {})
