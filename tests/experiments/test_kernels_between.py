"""Timing two checkouts side by side."""

import json
from pathlib import Path

import pytest

from experiments.kernels import between
from experiments.kernels.between import BetweenConfig

HERE = Path(__file__).parents[2]


@pytest.mark.full
def test_two_checkouts_take_turns(tmp_path):
    path = tmp_path / "out.json"
    options = ["--family", "linear_scan", "--repetitions", "1", "--length", "8"]
    assert between.main(["--before", str(HERE), *options, "--output", str(path)]) == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["before"] == record["after"]
    assert {row["family"] for row in record["rows"]} == {"linear_scan"}
    assert len(record["rows"]) == 4
    for row in record["rows"]:
        assert row["before/after"] == pytest.approx(row["before_ms"] / row["after_ms"])


def test_a_shape_is_cut_to_the_length_asked_for():
    programs = between.listed(BetweenConfig(before=HERE, family=("linear_scan",), length=512))
    factors = {shape: float(factor) for _, shape, _, factor in programs}
    assert factors == {"recurrentgemma-2b-packed": 512 / 8192, "s5-listops": 512 / 2048}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"before": Path("nowhere")}, "before='nowhere' is no checkout"),
        ({"before": HERE, "family": ("gpt",)}, "family='gpt' is not known"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BetweenConfig(**settings)


@pytest.mark.full
def test_a_process_that_ends_says_so():
    checkout = between.Checkout(HERE)
    try:
        with pytest.raises(RuntimeError, match="'gpt'"):
            checkout.seconds(["linear_scan", "gpt", "forward", "1"])
    finally:
        checkout.close()
