"""The trivial baselines on data whose best accuracy is known."""

import json

import numpy as np
import pytest

from experiments.lra import baselines as module
from experiments.lra.baselines import baselines, first_token, linear, majority, token_counts
from seqmodels.data.examples import Examples, Scaling, TaskData
from seqmodels.data.lra import ListOpsConfig, load


def task(rows, labels, test_rows=None, test_labels=None, num_classes=2):
    def examples(rows, labels):
        return Examples.from_sequences([np.array(row) for row in rows], labels)

    train = examples(rows, labels)
    test = train if test_rows is None else examples(test_rows, test_labels)
    return TaskData("toy", train, Examples.from_sequences([], []), test, 5, num_classes)


def test_majority_is_of_the_training_labels():
    assert majority(task([[1], [2], [3]], [1, 1, 0], [[1]] * 4, [1, 0, 0, 0])) == 0.25


def test_first_token():
    data = task([[1, 3], [1, 4], [2, 3], [2, 4], [2, 1]], [0, 0, 1, 1, 0])
    assert first_token(data) == 0.8
    unseen = task([[1], [2], [2]], [0, 1, 1], [[3], [3], [1]], [1, 0, 0])
    assert first_token(unseen) == pytest.approx(2 / 3)  # an unknown token gets the majority, 1


@pytest.mark.full
def test_token_counts_ignore_order_and_see_shares_and_length():
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 4, rng.integers(4, 9)) for _ in range(400)]
    by_share = [int(np.mean(row == 1) > np.mean(row == 2)) for row in rows]
    assert token_counts(task(rows, by_share)) > 0.93
    by_length = [int(len(row) > 6) for row in rows]
    assert token_counts(task(rows, by_length)) > 0.99
    by_order = [int(row[0] == 1) + 2 * int(row[0] == 2) for row in rows]
    data = task(rows, by_order, num_classes=3)
    assert token_counts(data) < 0.7
    assert token_counts(data, with_first_token=True) > 0.99


def test_linear_sees_values_and_their_places_but_no_products():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (600, 2000, 1), dtype=np.uint8)
    values[::2, :300] //= 2
    labels = np.arange(600) % 2
    scaling = Scaling((127.5,), (127.5,))

    def accuracy(labels):
        train = Examples.of_arrays(values[:400], labels[:400], scaling)
        test = Examples.of_arrays(values[400:], labels[400:], scaling)
        return linear(TaskData("toy", train, train.between(0, 0), test, None, 2))

    assert accuracy(labels) == 1.0
    same_sign = (values[:, 0, 0] > 127) == (values[:, 1900, 0] > 127)
    assert accuracy(same_sign.astype(int)) < 0.65


@pytest.mark.full
def test_listops_is_hardly_more_than_its_first_operator(tmp_path):
    config = ListOpsConfig(64, 200, train=6000, validation=0, test=2000)
    found = baselines(load(config, cache_dir=tmp_path, workers=1, progress=False))
    assert set(found) == {"majority", "first_token", "token_counts", "first_token_and_counts"}
    # About 0.16, 0.33, 0.19 and 0.33; four standard errors of 2000 answers are 0.04.
    assert abs(found["majority"] - 0.16) < 0.04
    assert abs(found["first_token"] - 0.33) < 0.045
    assert abs(found["token_counts"] - 0.19) < 0.04
    assert abs(found["first_token_and_counts"] - 0.33) < 0.045


def test_command_line(tmp_path, capsys):
    options = ["--min-length", "8", "--max-length", "40", "--max-depth", "5"]
    counts = ["--train", "60", "--validation", "0", "--test", "30"]
    assert module.main(["--cache-dir", str(tmp_path), "listops", *options, *counts]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["name"] == "listops"
    assert report["config"]["max_length"] == 40
    assert report["accuracy"]["majority"] <= 1
