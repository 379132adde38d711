"""ListOps: nested list operations on digits (Nangia & Bowman 2018), in Long Range Arena's version.

The grammar and its parameters are Long Range Arena's (Tay et al. 2021, arXiv:2011.04006): a node
above `max_depth` is an operator with probability 1/4 and a uniform digit otherwise, a node at
`max_depth` is always a digit; an operator is uniform among MIN, MAX, MED (the median, truncated)
and SM (the sum modulo 10) and has a uniform number of arguments in 2 .. `max_arguments`. A tree is
kept when `min_length < tokens < max_length`, where a digit is one token and an operator is two (it
opens and it closes). Samples are distinct over all splits. The official files were made without a
seed and cannot be reproduced bit for bit; `read_tsv` reads them.

Token ids are the positions in `SYMBOLS`, with 0 for padding: a vocabulary of 16. (The 18 often
quoted for ListOps counts padding, "unknown" and "end of sequence" besides the 15 symbols.)
"""

import contextlib
import functools
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from seqmodels.data import archive
from seqmodels.data.examples import Examples, TaskData, offsets_of
from seqmodels.data.workers import in_order
from seqmodels.ranges import Checked, Count, Range, Seed, Size

SYMBOLS = ("<pad>", "[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789")
WHERE = (
    "expected the ListOps folder of the Long Range Arena release (listops-1000), or leave data_dir "
    "out to generate the data"
)
MIN, MAX, MED, SM, CLOSE, DIGIT_0 = 1, 2, 3, 4, 5, 6

OPERATOR_PROBABILITY = 0.25
# Of the random stream, not of the result's quality: a change changes the samples of a seed.
_NODES_PER_BLOCK = 1_000_000
_BARREN_BLOCKS = 200


@dataclass(frozen=True)
class ListOpsConfig(Checked):
    """What to generate; the defaults are Long Range Arena's.

    Both length limits are strict and count tokens: `min_length < tokens < max_length`.
    `allow_partial` is of Long Range Arena's files where they are read instead (see `read_tsv`).

    Raises:
      ValueError: a value is out of range, or no tree can satisfy the limits.
    """

    min_length: Size = 500
    max_length: Size = 2000
    max_depth: Annotated[int, Range("in [2, 100]", 2, 100)] = 10
    max_arguments: Annotated[int, Range("in [2, 1000]", 2, 1_000)] = 10
    train: Size = 96_000
    validation: Count = 2_000
    test: Count = 2_000
    seed: Seed = 0
    allow_partial: bool = False

    @property
    def longest(self) -> int:
        """Tokens that a row has at most."""
        return self.max_length - 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < self.min_length + 2:
            raise ValueError(
                f"min_length={self.min_length} and max_length={self.max_length} are both "
                "exclusive and leave no length between them: make max_length larger"
            )
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = min(2 + self.max_arguments * longest, self.max_length)
        if longest <= self.min_length:
            raise ValueError(
                f"max_depth={self.max_depth} and max_arguments={self.max_arguments} allow at most "
                f"{longest} tokens, but min_length={self.min_length} asks for more"
            )


def generate(config: ListOpsConfig, *, workers: int = 1, progress: bool = True) -> TaskData:
    """Draws the three splits. The result depends on `config` only, not on `workers`.

    Blocks of trees are drawn independently, each from its own child of the seed, and taken in
    order, dropping repeats, until the splits are full.

    Args:
      workers: number of processes; they are spawned, so a script that passes more than 1 needs
        the usual `if __name__ == "__main__":`.

    Raises:
      ValueError: there are (almost) no further distinct trees within the limits.
    """
    draw = functools.partial(draw_block, config)
    counts = (config.train, config.validation, config.test)
    wanted = sum(counts)
    seen: set[bytes] = set()
    sequences: list[np.ndarray] = []
    labels: list[int] = []
    barren = 0
    with (
        contextlib.closing(in_order(draw, workers)) as blocks,
        tqdm(total=wanted, desc="ListOps", unit=" samples", disable=not progress) as bar,
    ):
        while len(labels) < wanted:
            before = len(labels)
            tokens, offsets, values = next(blocks)
            for i, value in enumerate(values.tolist()):
                sequence = tokens[offsets[i] : offsets[i + 1]]
                digest = hashlib.blake2b(sequence.tobytes(), digest_size=16).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                sequences.append(sequence)
                labels.append(value)
                if len(labels) == wanted:
                    break
            bar.update(len(labels) - before)
            barren = barren + 1 if len(labels) == before else 0
            if barren == _BARREN_BLOCKS:
                raise ValueError(
                    f"{wanted} distinct samples were asked for, but {config} yields no more than "
                    f"about {len(labels)}: widen the length limits or ask for fewer samples"
                )
    every = Examples.from_sequences(sequences, labels)
    ends = np.cumsum(counts)
    train, validation, test = (
        every.select(np.arange(end - count, end)) for count, end in zip(counts, ends, strict=True)
    )
    return task_data(train, validation, test, source="generated")


def task_data(train: Examples, validation: Examples, test: Examples, *, source: str) -> TaskData:
    """ListOps splits with the facts that hold for all of them."""
    return TaskData(
        name="listops",
        train=train,
        validation=validation,
        test=test,
        vocabulary_size=len(SYMBOLS),
        num_classes=10,
        description={"source": source, "symbols": list(SYMBOLS)},
    )


Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw_block(config: ListOpsConfig, block: int) -> Block:
    """Draws a fixed number of trees and keeps those within the limits.

    All trees grow together, level by level. A node adds to its tree's token count when it is
    created, so the count never falls and a tree may be abandoned once it reaches `max_length`
    without changing the distribution of the kept ones. A root digit is one token and never kept,
    so roots are operators from the start.

    Returns:
      tokens `(T,)` uint8, offsets `(n + 1,)` int64, values `(n,)` int32.
    """
    stream = np.random.SeedSequence(config.seed, spawn_key=(block,))
    rng = np.random.Generator(np.random.Philox(stream))
    trees = max(_NODES_PER_BLOCK // config.max_length, 1)
    levels, counts = _grow(rng, config, trees)
    kept = (config.min_length < counts) & (counts < config.max_length)
    arguments = [k[kept[tree]] for tree, k in levels]
    return _write(rng, arguments)


def _grow(
    rng: np.random.Generator, config: ListOpsConfig, trees: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Draws shapes.

    Returns:
      For each level its nodes' tree and number of arguments (0 for a digit), in the order of
      their parents; and the token count of each tree (a lower bound if it was abandoned).
    """
    tree = np.arange(trees)
    counts = np.ones(trees, np.int64)
    levels = []
    for depth in range(1, config.max_depth + 1):
        if depth == 1:
            operator = np.ones(len(tree), bool)
        elif depth < config.max_depth:
            operator = rng.random(len(tree), np.float32) < OPERATOR_PROBABILITY
        else:
            operator = np.zeros(len(tree), bool)
        k = np.zeros(len(tree), np.int64)
        k[operator] = rng.integers(2, config.max_arguments + 1, np.count_nonzero(operator))
        levels.append((tree, k))
        # The node itself was counted as one token; as an operator it also closes, and its
        # arguments are at least one token each.
        counts += np.bincount(tree[operator], k[operator] + 1, trees).astype(np.int64)
        tree = np.repeat(tree, np.where(counts[tree] < config.max_length, k, 0))
    return levels, counts


def _write(rng: np.random.Generator, arguments: list[np.ndarray]) -> Block:
    """Draws operators and digits for the given shapes, evaluates the trees, writes the tokens.

    Args:
      arguments: for each level, the number of arguments of its nodes in their parents' order.
    """
    symbols, sizes, values = [], [], []  # of each level, deepest first
    size = value = np.zeros(0, np.int64)
    for k in reversed(arguments):
        operator = k > 0
        symbol = DIGIT_0 + rng.integers(0, 10, len(k))
        symbol[operator] = rng.integers(MIN, SM + 1, np.count_nonzero(operator))
        k_operator = k[operator]
        own_size, own_value = np.ones(len(k), np.int64), symbol - DIGIT_0
        if len(k_operator):
            first = np.cumsum(k_operator) - k_operator
            own_size[operator] = 2 + np.add.reduceat(size, first)
            own_value[operator] = _apply(symbol[operator], value, first, k_operator)
        size, value = own_size, own_value
        symbols.append(symbol)
        sizes.append(size)
        values.append(value)
    symbols.reverse()
    sizes.reverse()

    offsets = offsets_of(sizes[0])
    tokens = np.zeros(offsets[-1], np.uint8)
    position = offsets[:-1]
    for level, k in enumerate(arguments):
        operator = k > 0
        tokens[position] = symbols[level]
        tokens[position[operator] + sizes[level][operator] - 1] = CLOSE
        if not operator.any():
            break
        # A child stands after its parent's opening token and its elder siblings.
        before = offsets_of(sizes[level + 1])[:-1]
        eldest = np.cumsum(k) - k
        shift = np.repeat(position[operator] + 1 - before[eldest[operator]], k[operator])
        position = before + shift
    return tokens, offsets, values[-1].astype(np.int32)


def _apply(
    operators: np.ndarray, values: np.ndarray, first: np.ndarray, k: np.ndarray
) -> np.ndarray:
    """Applies operator i to `values[first[i] : first[i] + k[i]]`."""
    group = np.repeat(np.arange(len(k)), k)
    ordered = np.sort(10 * group + values) % 10
    low, high = ordered[first + (k - 1) // 2], ordered[first + k // 2]
    results = (ordered[first], ordered[first + k - 1], (low + high) // 2)
    return np.choose(operators - MIN, (*results, np.add.reduceat(values, first) % 10))


def evaluate(tokens: np.ndarray) -> int:
    """The value, 0..9, of one expression of token ids.

    Raises:
      ValueError: the tokens are not one complete expression; says where it goes wrong.
    """
    stack: list[list[int]] = [[]]  # the outermost list receives the result
    operators: list[int] = []
    for place, token in enumerate(np.asarray(tokens).tolist()):
        if not operators and stack[0]:
            raise ValueError(f"token {place}: the expression was already complete")
        if MIN <= token <= SM:
            operators.append(token)
            stack.append([])
        elif token == CLOSE:
            if not operators or not stack[-1]:
                raise ValueError(f"token {place}: nothing to close")
            values = stack.pop()
            stack[-1].append(_value(operators.pop(), values))
        elif DIGIT_0 <= token < len(SYMBOLS):
            stack[-1].append(token - DIGIT_0)
        else:
            raise ValueError(f"token {place}: {token} is no id of this vocabulary")
    if operators or not stack[0]:
        raise ValueError(f"the expression ends early, with {len(operators)} operators open")
    return stack[0][0]


def _value(operator: int, values: list[int]) -> int:
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == SM:
        return sum(values) % 10
    ordered = sorted(values)
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) // 2


def to_text(tokens: np.ndarray) -> str:
    """Long Range Arena's text form, nested pairs: `( ( ( [SM 3 ) 2 ) ] )` for `[SM 3 2 ]`."""
    words: list[str] = []
    openings: list[int] = []  # where the open operators stand in `words`
    arguments: list[int] = []
    for token in np.asarray(tokens).tolist():
        word = SYMBOLS[token]
        if MIN <= token <= SM:
            openings.append(len(words))
            arguments.append(0)
            words.append(word)
            continue
        if token == CLOSE:
            start, count = openings.pop(), arguments.pop()
            words[start] = "( " * (count + 1) + words[start]
            word = "] )"
        if openings:
            arguments[-1] += 1
            word += " )"
        words.append(word)
    return " ".join(words)


_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS) if i}
_NO_PARENTHESES = str.maketrans("()", "  ")


def from_text(text: str) -> np.ndarray:
    """Token ids, `(length,)` uint8, of an expression; parentheses carry no information.

    Raises:
      ValueError: a word is not one of `SYMBOLS`.
    """
    words = text.translate(_NO_PARENTHESES).split()
    try:
        return np.array([_IDS[word] for word in words], np.uint8)
    except KeyError as error:
        raise ValueError(f"unknown symbol {error.args[0]!r}") from None


TSV_FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
_HEADER = "Source\tTarget"
_LARGEST = 1 << 31  # bytes of a file


def write_tsv(folder: str | Path, data: TaskData) -> None:
    """Writes the splits under Long Range Arena's file names, creating `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in data.splits.items():
        with open(folder / TSV_FILES[split], "w", encoding="ascii", newline="\n") as file:
            file.write(_HEADER + "\n")
            for i in range(len(examples)):
                example = examples[i]
                file.write(f"{to_text(example['inputs'])}\t{example['label']}\n")


def read_tsv(
    folder: str | Path,
    *,
    verify: bool = True,
    allow_partial: bool = False,
    progress: bool = True,
) -> TaskData:
    """Reads Long Range Arena's three files as they are: no length limit, repeats kept.

    Args:
      folder: the folder with the files, one above it in the release, or an archive with them.
      verify: evaluate every expression and compare with its label.
      allow_partial: accept other numbers of samples than the published ones, the defaults of
        `ListOpsConfig`; a file that was cut after a line has nothing else to tell it by.

    Raises:
      ValueError: a file is missing, a line is malformed or the number of lines is not the published
        one; names the file and the line.
    """
    splits, places = {}, {}
    for split, where, file in _tsv_files(folder):
        splits[split] = _read_split(where, file, verify, progress)
        places[split] = where
    for split, where in places.items():
        examples, published = splits[split], getattr(ListOpsConfig, split)
        if len(examples) != published and not allow_partial:
            raise ValueError(
                f"{where} holds {len(examples)} samples, the published file {published}: "
                "get it whole, or use what is there with --allow-partial"
            )
    return task_data(**splits, source="Long Range Arena's tsv files")


def _tsv_files(folder: str | Path) -> Iterator[tuple[str, str, io.TextIOWrapper]]:
    """Each split, where it is, and its text, from a folder or an archive."""
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
    source = Path(folder)
    if not source.is_file():
        for split, path in tsv_paths(source).items():
            with open(path, **options) as file:
                yield split, str(path), file
        return
    splits = {name: split for split, name in TSV_FILES.items()}
    missing = dict(splits)
    try:
        wanted = archive.members(source, _LARGEST, lambda name: Path(name).name in splits)
        for name, content in wanted:
            split = splits[Path(name).name]
            if Path(name).name not in missing or len(content) == _LARGEST:
                raise archive.DamagedError(f"{source}: {name} is there twice, or far too large")
            del missing[Path(name).name]
            yield split, f"{source}, {name}", io.TextIOWrapper(io.BytesIO(content), **options)
    except archive.DamagedError as error:
        raise ValueError(f"{error}; {WHERE}") from error
    if missing:
        raise ValueError(f"{source} does not hold {', '.join(missing)}; {WHERE}")


def tsv_paths(folder: str | Path) -> dict[str, Path]:
    """The file of each split.

    Raises:
      ValueError: one is missing.
    """
    below = ("", "listops-1000", "lra_release/listops-1000", "lra_release/lra_release/listops-1000")
    tried = [{split: Path(folder, b, name) for split, name in TSV_FILES.items()} for b in below]
    paths = max(tried, key=lambda paths: sum(path.is_file() for path in paths.values()))
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} does not hold {', '.join(missing)}: {WHERE}")
    return paths


def _read_split(where: str, file: io.TextIOWrapper, verify: bool, progress: bool) -> Examples:
    sequences, labels = [], []
    header = file.readline().rstrip("\n")
    if header != _HEADER:
        raise ValueError(f"{where}, line 1: expected {_HEADER!r}, found {header[:80]!r}")
    lines = tqdm(file, desc=Path(where).name, unit=" lines", disable=not progress)
    for number, line in enumerate(lines, start=2):
        try:
            tokens, label = _read_line(line.rstrip("\n"), verify)
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from None
        sequences.append(tokens)
        labels.append(label)
    return Examples.from_sequences(sequences, labels)


def _read_line(line: str, verify: bool) -> tuple[np.ndarray, int]:
    source, tab, target = line.partition("\t")
    if not tab or target not in set("0123456789"):
        raise ValueError(f"expected an expression, a tab and a digit, found {line[-40:]!r}")
    tokens = from_text(source)
    if not len(tokens):
        raise ValueError("the expression is empty")
    if verify and evaluate(tokens) != int(target):
        raise ValueError(f"the label is {target}, but the expression is {evaluate(tokens)}")
    return tokens, int(target)
