"""Every synthetic task: its oracle, its counted positions, fixed seeds; and what each is about."""

import dataclasses
import hashlib
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest

from seqmodels.config import from_dict, to_dict
from seqmodels.data.recall import TASKS, Examples, base, eval_batches, train_batches
from seqmodels.data.recall.copying import CopyingConfig
from seqmodels.data.recall.disjointness import DisjointnessConfig
from seqmodels.data.recall.induction import InductionConfig
from seqmodels.data.recall.mqar import MQARConfig
from seqmodels.data.recall.passkey import PasskeyConfig
from seqmodels.data.recall.regbench import RegBenchConfig, minimal
from seqmodels.data.recall.ruler_needles import NeedlesConfig
from seqmodels.data.recall.ruler_tracing import TracingConfig
from seqmodels.data.recall.ruler_words import CommonWordsConfig, FrequentWordsConfig
from seqmodels.data.recall.selective_copy import SelectiveCopyConfig
from seqmodels.data.recall.state_tracking import StateTrackingConfig, elements, generators, table

COUNTED = {
    "mqar": 4, "selective-copy": 16, "plain-copy": 16, "induction": 1, "passkey": 5, "parity": 16,
    "s3": 16, "a5": 16, "a5-2steps": 16, "s5": 16, "s5-swaps": 16,
    "copy-prefix": 4, "copy-suffix": 4, "disjointness": 1, "disjointness-long-first": 1,
    "niah-single": 7, "niah-multikey": 7, "niah-multikey-2": 7,
    "niah-multivalue": 28, "niah-multiquery": 28, "variable-tracking": 5, "common-words": 4,
    "frequent-words": 3,
}  # fmt: skip


def rows(config, split="validation", count=8, seed=3):
    examples = Examples(config, seed, split, count)
    return [examples.example(i) for i in range(count)]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_oracle_reads_the_inputs_and_is_always_right(name, multiple):
    config = TASKS[name] if multiple == 1 else TASKS[name].longer(multiple)
    for row in rows(config):
        assert row.inputs.shape == row.targets.shape == row.mask.shape == (config.tokens,)
        assert 0 <= row.inputs.min() <= row.inputs.max() < config.vocabulary_size
        assert 0 <= row.targets.min() <= row.targets.max() < config.vocabulary_size
        assert row.mask.any()
        assert row.right(config.solve(row.inputs)).sum() == row.mask.sum()
        if multiple == 1 and name in COUNTED:
            assert row.mask.sum() == COUNTED[name]


@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_knows_nothing_of_later_inputs(name):
    """What comes after the last counted position changes no answer; for most tasks, none before."""
    config = TASKS[name]
    row = rows(config, count=1)[0]
    last = np.flatnonzero(row.mask)[-1]
    cut = row.inputs[: last + 1]
    assert config.solve(cut)[last] == config.solve(row.inputs)[last]


@pytest.mark.parametrize("name", TASKS)
def test_guessing_is_worse_than_the_oracle(name):
    config = TASKS[name]
    assert 0 < config.chance < 1
    found = rows(config, count=16)
    answers = np.concatenate([row.targets[row.mask] for row in found])
    most_common = np.bincount(answers).argmax()
    right = sum(row.right(np.full(config.tokens, most_common)).sum() for row in found)
    assert right < 0.8 * len(answers)


@pytest.mark.parametrize("name", TASKS)
def test_an_example_is_always_the_same(name):
    examples = Examples(TASKS[name], 5, "train")
    backwards = {i: examples.example(i) for i in reversed(range(4))}
    batch = next(iter(train_batches(TASKS[name], seed=5, batch_size=4)))
    for i, row in backwards.items():
        np.testing.assert_array_equal(batch["inputs"][i], row.inputs)
        np.testing.assert_array_equal(batch["targets"][i], row.targets)
        asked = row.mask if row.trained is None else row.trained
        np.testing.assert_array_equal(batch["weights"][i] > 0, asked)
    assert batch["index"].tolist() == [0, 1, 2, 3]
    other_seed = Examples(TASKS[name], 6, "train")
    other_split = Examples(TASKS[name], 5, "validation")
    for other in (other_seed, other_split):
        assert any(
            not np.array_equal(other.example(i).inputs, row.inputs) for i, row in backwards.items()
        )


def digest():
    """Digest of one example of every task."""
    found = [Examples(config, 1, "test").example(2) for config in TASKS.values()]
    return hashlib.sha256(b"".join(r.inputs.tobytes() + r.targets.tobytes() for r in found))


def test_examples_are_the_same_in_every_process():
    """Nothing follows from the order of sets or the hash of strings."""
    imports = "import hashlib; from seqmodels.data.recall import TASKS, Examples"
    program = f"{imports}\n{inspect.getsource(digest)}\nprint(digest().hexdigest())"
    other = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert other.stdout.strip() == digest().hexdigest()


def test_a_stream_of_batches_goes_on_where_it_was():
    config = TASKS["mqar"]
    batches = iter(train_batches(config, seed=0, batch_size=2))
    next(batches)
    state = batches.get_state()
    expected = next(batches)
    again = iter(train_batches(config, seed=0, batch_size=2))
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["inputs"], expected["inputs"])


def test_evaluation_has_every_example_once():
    found = list(eval_batches(TASKS["induction"], seed=0, examples=7, batch_size=4))
    assert np.concatenate([b["index"] for b in found]).tolist() == [*range(7)]
    assert [len(b["inputs"]) for b in found] == [4, 3]
    assert "allowed" in next(
        iter(eval_batches(TASKS["regbench"], seed=0, examples=1, batch_size=1))
    )


@pytest.mark.parametrize("name", TASKS)
def test_configs_survive_json(name):
    config = TASKS[name]
    assert from_dict(type(config), to_dict(config)) == config


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (MQARConfig, {"length": 30, "pairs": 8}, "length=30 must be even and at least .* 32"),
        (MQARConfig, {"length": 63}, "length=63 must be even"),
        (MQARConfig, {"vocabulary": 8}, "vocabulary=8 must be even and at least 10 for pairs=4"),
        (SelectiveCopyConfig, {"length": 8}, "length=8 must be at least items=16"),
        (InductionConfig, {"length": 4, "payload": 2}, "length=4 must be at least .* 5"),
        (CopyingConfig, {"shortest": 30}, r"shortest=30 must be in \[1, longest=20\]"),
        (CopyingConfig, {"kind": "prefix", "alphabet": 2, "shortest": 6},
         "longest=20 must be at most alphabet.gram / 2 = 4"),
        (PasskeyConfig, {"length": 17}, "length=17 must be at least 18"),
        (StateTrackingConfig, {"moved": 2}, "moved=2 must be at least 3 for a5"),
        (StateTrackingConfig, {"group": "s5", "moved": 1}, "moved=1 must be at least 2 for s5"),
        (StateTrackingConfig, {"counted": 17}, "counted=17 must be at most length=16"),
        (StateTrackingConfig, {"group": "a6"}, "group='a6' is not one of"),
        (RegBenchConfig, {"length": 64}, "length=64 must be at least 100"),
        (RegBenchConfig, {"fewest": 1}, r"fewest=1 must be in \[2, most=12\]"),
        (RegBenchConfig, {"degree": 5}, r"fewest_letters=4 must be in \[degree=5"),
        (DisjointnessConfig, {"vocabulary": 40}, "vocabulary=40 must be at least twice .* 64"),
        (NeedlesConfig, {"length": 20}, "length=20 must be at least 21"),
        (NeedlesConfig, {"queries": 2}, "queries=2 must be at most keys=1"),
        (NeedlesConfig, {"length": 20_000, "haystack": "needles"}, "more than the 1024 keys"),
        (TracingConfig, {"length": 45}, "length=45 must be at least 46"),
        (TracingConfig, {"names": 9}, "names=9 must be at least .* 10"),
        (CommonWordsConfig, {"length": 50}, "length=50 must be at least 52"),
        (CommonWordsConfig, {"seldom": 12}, "seldom=12 must be below often=12"),
        (CommonWordsConfig, {"words": 100}, "words=100 must be at least 106"),
        (FrequentWordsConfig, {"length": 32}, "length=32 must be longer"),
        (FrequentWordsConfig, {"exponent": 1.0}, "exponent=1.0 must be above 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        from_dict(kind, fields)


def test_mqar_asks_for_each_pair_once_and_never_says_the_value():
    config = MQARConfig(length=64, pairs=8, vocabulary=128, noise="reserved")
    for row in rows(config):
        asked = row.inputs[row.mask]
        assert sorted(asked) == sorted(row.inputs[0:16:2])
        assert np.all(np.flatnonzero(row.mask) % 2 == 0)
        for value in row.targets[row.mask]:
            assert np.sum(row.inputs == value) == 1


def test_mqar_prefers_short_gaps_for_a_small_power():
    def first(power):
        config = MQARConfig(length=128, pairs=4, vocabulary=64, power=power)
        return np.mean([np.flatnonzero(row.mask).mean() for row in rows(config, count=64)])

    assert first(0.01) + 8 < first(1.0)


def test_selective_copies_stand_anywhere_and_plain_ones_at_the_start():
    config = SelectiveCopyConfig(length=64, items=8)
    for row in rows(config):
        assert np.sum(row.inputs[:64] < 16) == 8
    plain = dataclasses.replace(config, selective=False)
    assert all(np.all(row.inputs[:8] < 16) for row in rows(plain))


@pytest.mark.parametrize("kind", ["prefix", "suffix"])
def test_what_is_looked_up_occurs_once(kind):
    config = CopyingConfig(kind=kind, alphabet=8, gram=2, answer=2, shortest=12, longest=24)
    for row in rows(config, count=32):
        letters = row.inputs.tolist()
        bar = [t for t, token in enumerate(letters) if token == 9]
        string = letters[bar[0] + 1 : bar[1]] if kind == "prefix" else letters[1 : bar[0]]
        query = letters[1 : bar[0]] if kind == "prefix" else letters[bar[0] + 1 : bar[0] + 3]
        assert sum(string[i : i + 2] == query for i in range(len(string) - 1)) == 1


def test_duplicates_stand_twice():
    config = CopyingConfig(kind="duplicate", shortest=20, longest=20)
    for row in rows(config):
        string = row.inputs[1:21].tolist()
        grams = [tuple(string[i : i + 3]) for i in range(18)]
        assert len(set(grams)) < len(grams)


def test_the_passkey_stands_twice_at_a_boundary_of_the_phrase():
    config = PasskeyConfig(length=128)
    places = set()
    for row in rows(config, count=32):
        (begin,) = np.flatnonzero(row.inputs == 34)
        assert begin % 24 == 0
        places.add(int(begin))
        np.testing.assert_array_equal(row.inputs[begin + 1 : begin + 6], row.targets[row.mask])
        np.testing.assert_array_equal(row.inputs[begin + 7 : begin + 12], row.targets[row.mask])
    assert len(places) == 5


@pytest.mark.parametrize(("group", "size"), [("parity", 2), ("s3", 6), ("a5", 60), ("s5", 120)])
def test_groups_are_groups(group, size):
    products = table(group)
    assert len(elements(group)) == size
    np.testing.assert_array_equal(products[0], np.arange(size))
    np.testing.assert_array_equal(products[:, 0], np.arange(size))
    for each in (*products, *products.T):
        assert sorted(each) == [*range(size)]
    np.testing.assert_array_equal(products[products], products[:, products])  # (g h) k = g (h k)


@pytest.mark.parametrize(
    ("group", "moved", "size"),
    [("parity", 2, 2), ("s3", 2, 4), ("s3", 3, 6), ("a5", 3, 21), ("a5", 4, 36), ("s5", 2, 11)],
)
def test_elements_that_move_few_places_generate_the_group(group, moved, size):
    found = generators(group, moved)
    assert len(found) == size
    reached = {0}
    while True:
        further = reached | set(table(group)[np.ix_(sorted(reached), found)].ravel().tolist())
        if further == reached:
            break
        reached = further
    assert len(reached) == len(elements(group))
    config = StateTrackingConfig(group=group, moved=moved, length=40)
    seen = set(np.concatenate([row.inputs for row in rows(config, count=20)]).tolist())
    assert seen == set(found.tolist())


def test_blanks_give_a_model_more_steps():
    config = StateTrackingConfig(group="s3", length=4, steps=3)
    (row,) = rows(config, count=1)
    assert row.inputs.reshape(4, 3)[:, 1:].tolist() == [[6, 6]] * 4
    assert np.flatnonzero(row.mask).tolist() == [2, 5, 8, 11]
    longer = config.longer(2)
    assert (longer.length, longer.counted) == (8, 4)
    assert np.flatnonzero(rows(longer, count=1)[0].mask).tolist() == [14, 17, 20, 23]


def test_equal_states_are_merged_and_numbered_as_they_are_met():
    # 1 and 2 are equal, 3 is out of reach.
    assert minimal(({5: 1, 4: 2}, {7: 0}, {7: 0}, {1: 0})) == ({4: 1, 5: 1}, {7: 0})


def test_splits_of_regbench_share_no_automaton():
    config = RegBenchConfig(length=100)
    found = {}
    for split in base.SPLITS:
        drawn = [config.automaton(base.generator(0, split, i), split) for i in range(60)]
        for automaton in drawn:
            assert minimal(automaton) == automaton
            assert found.setdefault(repr(automaton), split) == split


def test_every_letter_of_regbench_is_allowed_and_any_allowed_one_is_right():
    config = RegBenchConfig(length=256, counted="all")
    for row in rows(config):
        letters = row.targets < 18
        np.testing.assert_array_equal(row.mask, letters)
        assert np.all(row.allowed[np.arange(256), row.targets] | ~letters)
        assert np.all(row.allowed[letters].sum(axis=1) <= 3)
        other = np.where(letters, row.allowed.argmax(axis=1), 0)
        assert row.right(other).sum() == row.mask.sum()


def test_lists_share_one_token():
    for row in rows(DisjointnessConfig(first=4, second=16, vocabulary=64)):
        a, c = set(row.inputs[1:5].tolist()), set(row.inputs[6:22].tolist())
        assert (len(a), len(c), a & c) == (4, 16, {int(row.targets[-1])})


@pytest.mark.parametrize("name", ["niah-multivalue", "niah-multiquery", "niah-multikey-2"])
def test_needles_are_there_as_often_as_they_should(name):
    config = TASKS[name]
    for row in rows(config):
        needles, asked = (np.sum(row.inputs == token) for token in (64, 66))
        expected = {"niah-multivalue": 4, "niah-multiquery": 4, "niah-multikey-2": 22}[name]
        assert (needles, asked) == (expected, 4 if name == "niah-multiquery" else 1)


def test_common_words_are_as_common_as_they_should_be_and_stand_anywhere():
    config = CommonWordsConfig()
    places = []
    for row in rows(config, count=32):
        counts = np.bincount(row.inputs[:252])
        assert set(counts[counts > 0]) == {2, 12}
        places.append(np.flatnonzero(row.inputs == row.targets[-1])[:12])
    assert len({tuple(p) for p in places}) == 32


def test_frequent_words_are_ranked():
    config = FrequentWordsConfig(length=256)
    for row in rows(config):
        counts = [np.sum(row.inputs[:253] == word) for word in row.targets[row.mask]]
        assert counts == [38, 17, 9]


@pytest.mark.parametrize("name", TASKS)
def test_the_context_can_be_read_twice(name):
    config = TASKS[name]
    (row,) = rows(config, count=1)
    if row.context == 0:
        with pytest.raises(ValueError, match="has no context to repeat"):
            eval_batches(config, seed=0, examples=1, batch_size=1, repeats=2)
        return
    twice = base.repeated(row, 2)
    assert len(twice.inputs) == len(row.inputs) + row.context
    np.testing.assert_array_equal(twice.inputs[: row.context], row.inputs[: row.context])
    np.testing.assert_array_equal(twice.inputs[row.context :], row.inputs)
    np.testing.assert_array_equal(twice.targets[twice.mask], row.targets[row.mask])
    assert not twice.mask[: row.context].any()
