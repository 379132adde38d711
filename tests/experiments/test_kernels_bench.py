"""The kernel benchmarks run, agree with what they are compared with, and record what they did."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from experiments.kernels import bench, results, s5_step, timing
from experiments.kernels import linear_scan as cases
from experiments.kernels.baselines import linear_scan as baselines
from experiments.kernels.results import Result, Target
from experiments.kernels.values import arguments
from pallas_kernels import linear_scan
from pallas_kernels.linear_scan.shapes import Shape
from pallas_kernels.tools import aot
from seqmodels.mixers import S5Config
from seqmodels.models import BackboneConfig, ClassifierConfig
from tests import tolerances

TINY = Shape("tiny", "a test", 2, 6, 4, "complex64")


@pytest.mark.always("scan, unroll 8-True-True", "associative_scan-False-False")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", baselines.SCANS)
def test_baselines_compute_what_the_op_computes(name, constant, reverse):
    shape = dataclasses.replace(TINY, constant=constant)
    a, b, state = arguments(linear_scan, shape, "forward")
    baseline = jax.jit(baselines.SCANS[name], static_argnames="reverse")
    for initial in (None, state):
        expected = linear_scan(a, b, initial_state=initial, reverse=reverse)
        actual = baseline(a, b, initial_state=initial, reverse=reverse)
        for x, y in zip(expected, actual, strict=True):
            np.testing.assert_allclose(y, x, **tolerances.EACH_FLOAT32_LAYER)


@pytest.mark.parametrize("name", baselines.SCANS)
def test_baselines_refuse_segments(name):
    a, b, _ = arguments(linear_scan, TINY, "forward")
    with pytest.raises(NotImplementedError, match="no segments"):
        baselines.SCANS[name](a, b, segment_ids=jnp.ones((2, 6), jnp.int32))


def test_a_program_that_computes_something_else_is_not_timed():
    programs = {"one": lambda x: x, "two": lambda x: 1.01 * x}
    with pytest.raises(AssertionError, match="two computes something else"):
        timing.medians(programs, (jnp.ones(3),), 1)


def test_timed_row_has_all_programs_and_ratios_of_their_medians():
    row = cases.timed(TINY, 2, targets=cases.TWICE)
    ms = {name.removesuffix(" ms"): value for name, value in row.figures.items()}
    assert set(ms) == {"linear_scan", *baselines.SCANS}
    assert row.ratios == {
        "associative_scan": ms["associative_scan"] / ms["linear_scan"],
        "scan": min(ms["scan, unroll 1"], ms["scan, unroll 8"]) / ms["linear_scan"],
    }
    with_state = cases.timed(TINY, 1, with_state=True)
    assert set(with_state.ratios) == {"scan"}


@pytest.mark.parametrize(
    ("bound", "value", "ratio", "met"),
    [("at least", 2, 2.5, True), ("at least", 2, 1.9, False), ("at most", 1.05, 1.1, False)],
)
def test_targets(bound, value, ratio, met):
    row = Result(
        "c", "cpu", results.TIMED, "s", ratios={"x": ratio}, targets={"x": Target(bound, value)}
    )
    assert row.to_json()["met"] == {"x": met}
    assert row.to_json()["targets"] == {"x": f"{bound} {value}"}


@pytest.mark.full
def test_static_estimate_of_a_baseline_and_a_missing_compiler(monkeypatch):
    row = cases.static("short", "forward", baseline="associative_scan")
    assert row.kind == results.STATIC
    assert row.ratios["floor"] > 1
    monkeypatch.setattr(aot, "missing", lambda chip: "pip install something")
    row = cases.static("short", "forward")
    assert (row.kind, row.figures) == (results.NOT_RUN, {"reason": "pip install something"})


def test_a_program_that_does_not_compile_is_a_row():
    row = cases.static("short", "forward", baseline="scan, unroll 1")
    assert row.kind == results.FAILED
    assert "while" in row.figures["reason"]


def test_gpu_rows_say_that_nothing_was_run():
    assert {row.kind for row in cases.gpu(1, ())} == {results.NOT_RUN}


@pytest.mark.full
def test_s5_step_compares_scans_and_gives_the_shares_of_its_parts():
    stack = BackboneConfig(("s5",), (S5Config(state_size=4),), 8, gate="half_glu2")
    config = ClassifierConfig(stack, num_classes=2, vocabulary_size=5)
    compiled, args = s5_step.programs(config, 2, 4)
    step, other = (jax.tree.leaves(compiled[n](*args)) for n in ("step", "associative_scan"))
    for x, y in zip(step, other, strict=True):
        np.testing.assert_allclose(y, x, **tolerances.EACH_FLOAT32_TIMED)
    parts = ("scan", "norm", "gate")
    for part in parts:
        flops = {name: run.cost_analysis()["flops"] for name, run in compiled.items()}
        assert flops[f"without {part}"] < flops["step"]
    row = s5_step.result("step", "tiny", compiled, args, 1)
    ms = row.figures
    shares = {f"share of {p}": 1 - ms[f"without {p} ms"] / ms["step ms"] for p in parts}
    assert row.ratios == {
        "associative_scan": ms["associative_scan ms"] / ms["step ms"],
        **shares,
    }


def test_results_are_complete_after_every_row(tmp_path):
    config = bench.BenchConfig(only="cpu", repetitions=1, output=tmp_path / "deep" / "bench.json")

    def rows():
        yield cases.timed(TINY, 1, targets=cases.TWICE)
        assert len(json.loads(config.path.read_text())["cases"]) == 1
        yield Result("c", "gpu", results.NOT_RUN, "s", figures={"reason": "no GPU"})

    console = rich.console.Console(record=True, width=200)
    console.print(bench.table(bench.run(config, rows(), console)))
    text = console.export_text()
    assert "at least 2" in text
    assert "no GPU" in text
    record = json.loads(config.path.read_text())
    expected = {"config", "commit", "versions", "device", "started", "wall_s", "cases"}
    assert expected <= record.keys()
    assert record["config"]["repetitions"] == 1
    assert [case["kind"] for case in record["cases"]] == [results.TIMED, results.NOT_RUN]
    assert {"figures", "ratios", "targets", "met", "shape"} <= record["cases"][0].keys()


def test_partial_results_do_not_overwrite_the_full_ones():
    assert bench.BenchConfig().path.name == "linear_scan.json"
    assert bench.BenchConfig(only="tpu").path.name == "linear_scan-tpu.json"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetitions": 0}, "repetitions=0"),
        ({"family": "quadratic_scan"}, "family='quadratic_scan' is not one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bench.BenchConfig(**options)
