"""Metrics files: truncation, damage, NaN."""

import json
import math

import pytest

from seqmodels.training.metrics import (
    MetricsWriter,
    finite,
    read_jsonl,
    truncate_jsonl,
    unbounded,
)


def test_resuming_drops_what_came_after(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write("train", step, {"loss": 0.5 * step})
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write("train", 3, {"loss": 7.0})
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["loss"] for record in records] == [0.5, 1.0, 7.0]


def test_truncation_keeps_the_lines_as_they_were(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"loss": 1 / 3, "order": "abc"})
    before = path.read_bytes()
    with path.open("a") as file:
        file.write(json.dumps({"step": 9}) + "\n" + '{"kind": "train", "st')
    truncate_jsonl(path, 1)
    assert path.read_bytes() == before


def test_a_cut_off_last_line_is_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_jsonl(path) == [{"step": 1}]


def test_damage_inside_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_jsonl(path)


def test_no_file_no_records(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_nan_stays_valid_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"loss": float("nan"), "norm": float("-inf")})
    record = read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert (record["loss"], record["norm"]) == ("nan", "-inf")


def test_what_json_cannot_hold_comes_back():
    value = {"limits": [0.0, float("inf")], "low": {"least": float("-inf")}, "name": "s5", "n": 3}
    written = finite(value)
    assert written["limits"][1] == "inf"
    assert unbounded(json.loads(json.dumps(written))) == value
    assert math.isnan(unbounded(finite(float("nan"))))
