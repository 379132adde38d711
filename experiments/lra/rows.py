"""Our rows: result files of `seqmodels lra train`, and what the report says of each."""

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.errors import UsageError
from experiments.lra.experiment import ExperimentConfig
from experiments.lra.presets import PAPER
from experiments.lra.result import read_result
from experiments.places import committed
from seqmodels.config import from_dict, to_dict
from seqmodels.data.lra import TASKS
from seqmodels.mixers import BidirectionalConfig, MixerConfig, build

COMMITTED = committed("lra")
OWN = Path("runs/results/lra")
"""Where `seqmodels lra train` writes; git ignores it."""

BUDGETS = (10, 60)
"""Minutes of training by which rows are grouped."""

WINDOWS = (5, 61)
"""Tokens that a model of the "local" columns sees: the two sizes of the benchmark's critics."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation or logged average of a run.

    Attributes:
      step: after which it was made.
      tokens: read in training up to there; None where the file does not say.
      loss, accuracy: None where they were not finite.
    """

    step: int
    tokens: int | None
    loss: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One result file.

    Attributes:
      path: the file.
      committed: whether it is one of the repository's; the user's own otherwise.
      result: what is in it.
      config: the experiment.
    """

    path: Path
    committed: bool
    result: Mapping[str, Any]
    config: ExperimentConfig

    @property
    def name(self) -> str:
        """What ``--check`` calls it."""
        return self.path.stem

    @property
    def label(self) -> str:
        """Task, model, preset, window and seed in words."""
        window = self.config.classifier.window
        words: list[str] = [self.config.task, self.config.model, self.config.preset]
        words += [] if window is None else [f"window {window}"]
        words += [] if self.config.pretrain is None else ["pretrained"]
        return " ".join([*words, f"seed {self.config.train.seed}"])

    @property
    def title(self) -> str:
        """The task and the most tokens that an input has."""
        return f"{self.config.task}, {self.longest:,} tokens"

    @functools.cached_property
    def experiment(self) -> str:
        """Equal for equal experiments on equal data, whatever their window."""
        classifier = dataclasses.replace(self.config.classifier, window=None)
        config = to_dict(dataclasses.replace(self.config, classifier=classifier))
        return json.dumps([config, self.result["data"].get("digest")], sort_keys=True)

    @property
    def accuracy(self) -> float:
        """Test accuracy in percent."""
        return 100 * float(self.result["test_accuracy"])

    @property
    def longest(self) -> int:
        """The most tokens an input has."""
        return min(self.config.data.longest, self.config.lengths[-1])

    @property
    def minutes(self) -> float:
        """Minutes of training, compiling and validating included, over all starts."""
        return float(self.result["wall_seconds"]) / 60

    @property
    def budget(self) -> int | None:
        """The least of ``BUDGETS`` that the run was meant to fit, or did; None for none.

        A run that was told its minutes may take a little longer.
        """
        told = self.result["config"].get("minutes") or self.config.train.max_minutes
        minutes = self.minutes if told is None else told
        return next((budget for budget in BUDGETS if minutes <= budget), None)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of training by the whole wall time; None without a time."""
        seconds = self.result["wall_seconds"]
        return self.result["tokens"] / seconds if seconds else None

    @property
    def state_bytes(self) -> int | None:
        """Float32 state of one row after the longest input, all layers and directions; None where
        the mixer has no one-directional form."""
        backbone = self.config.classifier.backbone
        length = self.config.classifier.window or self.longest
        sizes = [_state_bytes(mixer, backbone.width, length) for mixer in backbone.each_mixer()]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def baseline(self) -> tuple[str, float]:
        """The best predictor without a sequence model: its name and accuracy in percent."""
        name, value = max(self.result["baselines"].items(), key=lambda item: item[1])
        return name.replace("_", " "), 100 * value

    @property
    def caveats(self) -> list[str]:
        """Why it must not be read against the published column; empty if it may."""
        return _caveats(self)

    def curve(self, kind: str) -> list[Point]:
        """The points of ``kind`` "train" or "eval", as they came."""
        points, tokens = [], {0: 0}
        for record in self.result["curve"]:
            step = record["step"]
            if "tokens" in record:
                tokens[step] = record["tokens"]
            if record["kind"] == kind:
                known = tokens.get(step, self.result["tokens"] if step == self.steps else None)
                loss, accuracy = (
                    record[name] if isinstance(record[name], int | float) else None
                    for name in ("loss", "accuracy")
                )
                points.append(Point(step, known, loss, accuracy))
        return points

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.result["steps"])


def _state_bytes(mixer: MixerConfig, width: int, length: int) -> int | None:
    directions = 1 if mixer.stateful else 2
    if isinstance(mixer, BidirectionalConfig):
        mixer = mixer.local
    if not mixer.stateful:
        if "bidirectional" not in {field.name for field in dataclasses.fields(mixer)}:
            return None
        mixer = dataclasses.replace(mixer, **{"bidirectional": False})
    start = build(mixer, width, parent=None).initial_state
    state = jax.eval_shape(lambda: start(1, max_length=length, dtype=jnp.float32))
    return directions * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def read_rows(*folders: Path) -> list[Row]:
    """All rows, by task, model, preset, window and seed; the committed ones of a name first.

    Raises:
      ValueError: there is none, or a file is not a result; it names the file.
    """
    rows = []
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            result = read_result(path)
            config = from_dict(ExperimentConfig, result["config"], where="config")
            rows.append(Row(path, path.parent.resolve() == COMMITTED.resolve(), result, config))
    if not rows:
        raise ValueError(
            f"no results in {', '.join(map(str, folders))}; make one with "
            "seqmodels lra train, or name another --results-dir"
        )

    def order(row: Row) -> tuple[Any, ...]:
        config = row.config
        names = (config.task, config.model, config.preset, config.classifier.window or 0)
        return (*names, config.train.seed, not row.committed, str(row.path))

    return sorted(rows, key=order)


def find(rows: Sequence[Row], name: str) -> Row:
    """The row of this name, the committed one if there are two; or that of a result file's path.

    Raises:
      UsageError: there is none; it says which come nearest.
    """
    for row in rows:
        if name in (row.name, str(row.path)):
            return row
    names = list(dict.fromkeys(row.name for row in rows))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    raise UsageError(f"--check {name}: no row has that name; the nearest are {', '.join(near)}")


def windowed(row: Row, rows: Iterable[Row], window: int) -> Row | None:
    """The row of the same experiment where the model sees only so many tokens."""
    for other in rows:
        if other.config.classifier.window == window and other.experiment == row.experiment:
            return other
    return None


def by_data(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows on the same data, in the order given."""
    groups: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        digest = json.dumps(row.result["data"].get("digest"))
        groups.setdefault((row.title, digest), []).append(row)
    return list(groups.values())


def whole(rows: Sequence[Row]) -> list[Row]:
    """Those with a line of their own: not the windowed ones that stand beside another."""
    beside = {
        id(windowed(row, rows, window))
        for row in rows
        if row.config.classifier.window is None
        for window in WINDOWS
    }
    return [row for row in rows if id(row) not in beside]


def seeds(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but their seed, two or more together, one of each seed."""
    groups: dict[str, dict[int, Row]] = {}
    for row in rows:
        config = dataclasses.replace(
            row.config, train=dataclasses.replace(row.config.train, seed=0)
        )
        group = groups.setdefault(json.dumps(to_dict(config), sort_keys=True), {})
        group.setdefault(row.config.train.seed, row)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def _caveats(row: Row) -> list[str]:
    """Why a row must not be read against the published column; empty if it may."""
    reasons = []
    if row.config.classifier.window is not None:
        reasons.append(f"sees windows of {row.config.classifier.window} tokens only")
    whole = TASKS[row.config.task]
    data, paper = to_dict(row.config)["data"], to_dict(whole)
    if row.config.task == "listops":
        keys = ("min_length", "max_length", "max_depth", "max_arguments")
        if any(data[key] != paper[key] for key in keys):
            reasons.append(f"ListOps of at most {row.longest} tokens, not the published 2K task")
    elif row.longest < whole.longest:
        reasons.append(f"cut to {row.longest} tokens, published {whole.longest}")
    reasons += [
        f"data.{key}={data[key]}, published {paper[key]}"
        for key in ("difficulty", "train")
        if row.config.task != "listops" and key in data and data[key] != paper[key]
    ]
    published = PAPER.get((row.config.task, row.config.model))
    if published is None:
        reasons.append("no published recipe")
    else:
        if dataclasses.replace(row.config.classifier, window=None) != published.classifier:
            reasons.append("other model size")
        if row.steps < published.train.steps:
            reasons.append(f"published recipe {published.train.steps} steps")
    if data.get("allow_partial"):
        reasons.append("perhaps a part of the data (--allow-partial)")
    return reasons
