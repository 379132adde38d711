"""ListOps: generation against an independent generator and evaluator, and its text form."""

import dataclasses
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels.data.lra import listops
from seqmodels.data.lra.listops import SYMBOLS, ListOpsConfig
from tests.seqmodels.data.lra import original_files as original

SMALL = ListOpsConfig(8, 40, max_depth=5, train=300, validation=40, test=20, seed=3)


# --- an independent description of the task: trees as nested tuples ---------------------------


def grow(rng, max_depth, max_arguments, depth=1):
    if depth < max_depth and rng.random() <= 0.25:
        count = rng.randint(2, max_arguments)
        children = [grow(rng, max_depth, max_arguments, depth + 1) for _ in range(count)]
        return (rng.choice(["[MIN", "[MAX", "[MED", "[SM"]), *children)
    return rng.randint(0, 9)


def value(tree):
    if isinstance(tree, int):
        return tree
    name, *children = tree
    values = [value(child) for child in children]
    functions = {"[MIN": min, "[MAX": max, "[MED": np.median, "[SM": lambda v: sum(v) % 10}
    return int(functions[name](values))


def words(tree):
    if isinstance(tree, int):
        return [str(tree)]
    return [tree[0], *(word for child in tree[1:] for word in words(child)), "]"]


def text(tree):
    if isinstance(tree, int):
        return str(tree)
    pairs = tree[0]
    for child in tree[1:]:
        pairs = f"( {pairs} {text(child)} )"
    return f"( {pairs} ] )"


def ids(tree):
    return np.array([SYMBOLS.index(word) for word in words(tree)], np.uint8)


def parse(tokens):
    remaining = [SYMBOLS[token] for token in tokens]

    def node():
        word = remaining.pop(0)
        if word.isdigit():
            return int(word)
        children = []
        while remaining[0] != "]":
            children.append(node())
        remaining.pop(0)
        return (word, *children)

    tree = node()
    assert not remaining
    return tree


def operator_depth(tree):
    return 0 if isinstance(tree, int) else 1 + max(map(operator_depth, tree[1:]))


TREES = st.recursive(
    st.integers(0, 9),
    lambda child: st.builds(
        lambda name, children: (name, *children),
        st.sampled_from(SYMBOLS[1:5]),
        st.lists(child, min_size=2, max_size=10),
    ),
    max_leaves=40,
)


# --- generation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return listops.generate(SMALL, progress=False)


def sequences(data):
    return [split[i]["inputs"] for split in data.splits.values() for i in range(len(split))]


def test_the_splits_are_full_distinct_and_within_the_limits(small):
    assert [len(split) for split in small.splits.values()] == [300, 40, 20]
    lengths = np.array([len(sequence) for sequence in sequences(small)])
    assert lengths.min() == 9  # both limits are strict, and this many samples reach both
    assert lengths.max() == 39
    assert len({sequence.tobytes() for sequence in sequences(small)}) == 360
    assert (small.vocabulary_size, small.num_classes) == (16, 10)


def test_labels_are_the_values_and_shapes_follow_the_grammar(small):
    for split in small.splits.values():
        for i in range(len(split)):
            tree = parse(split[i]["inputs"])
            assert value(tree) == split[i]["label"]
            assert 1 <= operator_depth(tree) <= SMALL.max_depth - 1


def test_max_depth_and_max_arguments_bind():
    config = ListOpsConfig(6, 60, max_depth=3, max_arguments=3, train=500, validation=0, test=0)
    trees = [parse(tokens) for tokens in sequences(listops.generate(config, progress=False))]
    widths = {len(tree) - 1 for tree in trees}
    assert {operator_depth(tree) for tree in trees} == {2}  # 2 is needed for more than 6 tokens
    assert widths == {2, 3}


def test_the_seed_alone_decides_and_workers_do_not(small):
    again = listops.generate(SMALL, workers=2, progress=False)
    other = listops.generate(dataclasses.replace(SMALL, seed=4), progress=False)
    for split, examples in small.splits.items():
        for array in ("tokens", "offsets", "labels"):
            assert np.array_equal(getattr(examples, array), getattr(again.splits[split], array))
    assert not np.array_equal(small.train.labels, other.train.labels)


def test_a_larger_set_begins_with_the_smaller_one(small):
    larger = listops.generate(dataclasses.replace(SMALL, train=1000), progress=False)
    assert np.array_equal(larger.train.labels[:300], small.train.labels)


def two_samples_differ_by(first, second):
    """Chi-square of two histograms, divided by its expectation if they had one distribution."""
    used = first + second > 20
    total = (first + second)[used]
    share = first.sum() / (first + second).sum()
    chi2 = (first[used] - total * share) ** 2 / (total * share * (1 - share))
    return chi2.sum() / (used.sum() - 1)


@pytest.fixture(scope="module")
def plain():
    """Trees of an independent generator under SMALL's limits."""
    rng = random.Random(0)
    trees = []
    while len(trees) < 6000:
        tree = grow(rng, SMALL.max_depth, SMALL.max_arguments)
        if 8 < len(words(tree)) < 40:
            trees.append(tree)
    return trees


@pytest.fixture(scope="module")
def many():
    """Trees of `draw_block`, before repeats are dropped."""
    tokens, offsets, _ = listops.draw_block(SMALL, 0)
    return [parse(tokens[offsets[i] : offsets[i + 1]]) for i in range(6000)]


STATISTICS = {
    "length": lambda tree: len(words(tree)),
    "label": value,
    "operator and label": lambda tree: 10 * SYMBOLS.index(tree[0]) + value(tree),
    "arguments": lambda tree: len(tree) - 1,
    "depth": operator_depth,
    "first argument": lambda tree: SYMBOLS.index(words(tree)[1]),
    "last argument": lambda tree: SYMBOLS.index(words(tree)[-2]),
}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_distributed_as_an_independent_generator(statistic, plain, many):
    of = STATISTICS[statistic]
    first, second = (
        np.bincount([of(tree) for tree in trees], minlength=60) for trees in (plain, many)
    )
    assert two_samples_differ_by(first, second) < 2.5
    # The test can fail: shifting one histogram by a bin is seen.
    assert two_samples_differ_by(first, np.roll(second, 1)) > 2.5


def test_long_range_arenas_parameters_give_its_known_figures():
    config = ListOpsConfig()
    blocks = [listops.draw_block(config, block) for block in range(6)]
    lengths = np.concatenate([np.diff(offsets) for _, offsets, _ in blocks])
    labels = np.concatenate([values for _, _, values in blocks])
    roots = np.concatenate([tokens[offsets[:-1]] for tokens, offsets, _ in blocks])
    n = len(labels)
    # 500 operator roots a block; a quarter of all roots are operators; 8.2 % of trees are kept.
    assert abs(n / (6 * 500) / 4 - 0.082) < 0.009
    assert 500 < lengths.min() < 520
    assert 1900 < lengths.max() < 2000
    assert abs(np.median(lengths) - 957) < 60
    frequencies = np.bincount(labels, minlength=10) / n
    assert np.all(abs(frequencies[[0, 9]] - 0.165) < 0.05)
    assert np.all(abs(frequencies[1:9] - 0.083) < 0.04)
    assert np.all(abs(np.bincount(roots, minlength=5)[1:5] / n - 0.25) < 0.06)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"min_length": 0}, "min_length=0"),
        ({"max_length": 501}, "max_length=501"),
        ({"max_depth": 1}, "max_depth=1"),
        ({"max_arguments": 1}, "max_arguments=1"),
        ({"train": 0}, "train=0"),
        ({"test": -1}, "test=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"max_depth": 3, "max_arguments": 3}, "at most 17 tokens"),  # 2 + 3 * (2 + 3)
    ],
)
def test_bad_configs_are_refused(changes, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        ListOpsConfig(**changes)


def test_asking_for_more_samples_than_exist_stops(monkeypatch):
    monkeypatch.setattr(listops, "_NODES_PER_BLOCK", 500)
    config = ListOpsConfig(3, 5, max_depth=2, max_arguments=2, train=500, validation=0, test=0)
    with pytest.raises(ValueError, match="no more than about 400"):  # 4 operators, 100 pairs
        listops.generate(config, progress=False)


def test_workers_must_be_positive():
    with pytest.raises(ValueError, match="workers=0"):
        listops.generate(SMALL, workers=0)


# --- evaluation ------------------------------------------------------------------------------


@given(TREES)
@settings(max_examples=100, deadline=None)
def test_evaluate_and_text_agree_with_the_tree(tree):
    tokens = ids(tree)
    assert listops.evaluate(tokens) == value(tree)
    assert listops.to_text(tokens) == text(tree)
    assert np.array_equal(listops.from_text(text(tree)), tokens)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ([], "ends early"),
        ([1, 6], "ends early, with 1 operators open"),
        ([5], "nothing to close"),
        ([1, 5], "token 1: nothing to close"),
        ([6, 6], "token 1: the expression was already complete"),
        ([1, 6, 5, 5], "token 3: the expression was already complete"),
        ([0], "0 is no id"),
        ([16], "16 is no id"),
    ],
)
def test_evaluate_refuses_what_is_no_expression(tokens, problem):
    with pytest.raises(ValueError, match=problem):
        listops.evaluate(np.array(tokens))


def test_the_documented_text_form():
    tokens = listops.from_text("[SM 3 2 ]")
    assert listops.to_text(tokens) == "( ( ( [SM 3 ) 2 ) ] )"
    assert listops.evaluate(tokens) == 5


# --- tsv files -------------------------------------------------------------------------------


def test_tsv_round_trip(small, tmp_path):
    listops.write_tsv(tmp_path / "new" / "folder", small)
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["basic_test.tsv", "basic_train.tsv", "basic_val.tsv"]
    back = listops.read_tsv(tmp_path / "new" / "folder", allow_partial=True, progress=False)
    for split, examples in small.splits.items():
        for array in ("tokens", "offsets", "labels"):
            assert np.array_equal(getattr(examples, array), getattr(back.splits[split], array))


def test_lines_of_other_systems_in_a_folder_above(small, tmp_path):
    folder = tmp_path / "lra_release" / "lra_release" / "listops-1000"
    listops.write_tsv(folder, small)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    back = listops.read_tsv(tmp_path, allow_partial=True, progress=False)
    assert np.array_equal(back.train.tokens, small.train.tokens)
    assert np.array_equal(back.test.labels, small.test.labels)


def test_an_archive_is_read_as_its_folder_is(small, tmp_path):
    listops.write_tsv(tmp_path, small)
    files = {f"lra_release/listops-1000/{p.name}": p.read_bytes() for p in tmp_path.iterdir()}
    path = original.tar(tmp_path / "lra_release.gz", files | {"README": b"x"})
    back = listops.read_tsv(path, allow_partial=True, progress=False)
    for split, examples in small.splits.items():
        assert np.array_equal(examples.tokens, back.splits[split].tokens)
    with pytest.raises(
        ValueError, match=r"listops-1000/basic_\w+\.tsv holds \d+ samples, the publ"
    ):
        listops.read_tsv(path, progress=False)
    cut = original.tar(path, dict(list(files.items())[:2]))
    with pytest.raises(ValueError, match=r"does not hold basic_\w+\.tsv; expected"):
        listops.read_tsv(cut, allow_partial=True, progress=False)
    twice = original.tar(path, files | {f"a/{listops.TSV_FILES['test']}": b""})
    with pytest.raises(ValueError, match=r"a/basic_test\.tsv is there twice"):
        listops.read_tsv(twice, allow_partial=True, progress=False)


def write_files(folder, lines):
    folder.mkdir(exist_ok=True)
    for name in listops.TSV_FILES.values():
        (folder / name).write_text("Source\tTarget\n( ( ( [SM 3 ) 2 ) ] )\t5\n")
    (folder / "basic_val.tsv").write_text("".join(lines))


HEADER = "Source\tTarget\n"
GOOD = "( ( ( [MIN 3 ) 2 ) ] )\t2\n"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["Target\tSource\n", GOOD], "basic_val.tsv, line 1: expected"),
        ([HEADER, GOOD, "[MIN 3 2 ]\n"], "basic_val.tsv, line 3: expected an expression, a tab"),
        ([HEADER, GOOD, "[MIN 3 2 ]\t12\n"], "line 3: expected an expression, a tab and a digit"),
        ([HEADER, "[FIRST 3 2 ]\t3\n"], "line 2: unknown symbol '.FIRST'"),
        ([HEADER, "[MIN 3 2\t2\n"], "line 2: the expression ends early"),
        ([HEADER, "[MIN 3 2 ]\t3\n"], "line 2: the label is 3, but the expression is 2"),
        ([HEADER, "\t3\n"], "line 2: the expression is empty"),
    ],
)
def test_malformed_lines_are_named(lines, problem, tmp_path):
    write_files(tmp_path, lines)
    with pytest.raises(ValueError, match=problem):
        listops.read_tsv(tmp_path, progress=False)


def test_labels_are_taken_as_they_are_without_verification(tmp_path):
    write_files(tmp_path, [HEADER, "[MIN 3 2 ]\t3\n"])
    data = listops.read_tsv(tmp_path, verify=False, allow_partial=True, progress=False)
    assert data.validation.labels == [3]


def test_files_of_other_numbers_than_the_published_are_refused(tmp_path, monkeypatch):
    write_files(tmp_path, [HEADER, GOOD, GOOD])
    counts = {"train": 1, "validation": 2, "test": 1}
    for split, count in counts.items():
        monkeypatch.setattr(ListOpsConfig, split, count)
    read = {split: len(each) for split, each in listops.read_tsv(tmp_path).splits.items()}
    assert read == counts
    write_files(tmp_path, [HEADER, GOOD])  # cut after a line
    message = r"basic_val.tsv holds 1 samples, the published file 2: .*--allow-partial"
    with pytest.raises(ValueError, match=message):
        listops.read_tsv(tmp_path)


def test_missing_tsv_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"does not hold basic_train\.tsv, basic_val\.tsv, basic"):
        listops.read_tsv(tmp_path)
