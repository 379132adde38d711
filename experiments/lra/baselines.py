"""What predictors without any sequence model reach on a task: the figures a model has to beat.

seqmodels lra baselines listops --cache-dir ~/.cache/seqmodels
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.command_line import run_command
from seqmodels.data.examples import Examples, TaskData
from seqmodels.data.lra import (
    CifarConfig,
    ListOpsConfig,
    MnistConfig,
    PathfinderConfig,
    RetrievalConfig,
    SpeechConfig,
    TextConfig,
    load,
)
from seqmodels.ranges import Checked


def baselines(data: TaskData) -> dict[str, float]:
    """Test accuracies, in 0 .. 1, of predictors fitted to the training split.

    - `majority`: the most frequent label.

    Of token ids:

    - `first_token`: the most frequent label among the sequences that begin with the same token; on
      ListOps, the outermost operator.
    - `token_counts`: multinomial logistic regression on how often each token occurs; of a pair, in
      either text, and the difference.
    - `first_token_and_counts`: the same, given the first token as well.

    Of real values:

    - `linear`: the same on the values themselves, or on the means of 256 stretches of a row that
      is longer, and on mean and deviation of the row.
    """
    found = {"majority": majority(data)}
    if data.vocabulary_size is None:
        return found | {"linear": linear(data)}
    if data.train.parts > 1:
        return found | {"token_counts": token_counts(data)}
    return found | {
        "first_token": first_token(data),
        "token_counts": token_counts(data),
        "first_token_and_counts": token_counts(data, with_first_token=True),
    }


def majority(data: TaskData) -> float:
    guess = np.bincount(data.train.labels, minlength=data.num_classes).argmax()
    return float(np.mean(data.test.labels == guess))


def first_token(data: TaskData) -> float:
    """A first token that training does not know gets the most frequent label of all."""
    assert data.vocabulary_size is not None
    votes = np.zeros((data.vocabulary_size, data.num_classes), np.int64)
    np.add.at(votes, (_first_tokens(data.train), data.train.labels), 1)
    overall = votes.sum(axis=0).argmax()
    guesses = np.where(votes.any(axis=1), votes.argmax(axis=1), overall)
    return float(np.mean(data.test.labels == guesses[_first_tokens(data.test)]))


def token_counts(data: TaskData, *, with_first_token: bool = False) -> float:
    """Logistic regression on each token's share of the sequence and the length."""
    assert data.vocabulary_size is not None
    size = data.vocabulary_size
    return _regression(data, lambda examples: _counts(examples, size, with_first_token))


def linear(data: TaskData) -> float:
    """Logistic regression on real values."""
    longest = max(int(examples.lengths.max(initial=1)) for examples in data.splits.values())
    return _regression(data, lambda examples: _stretches(examples, longest))


def _regression(
    data: TaskData,
    features: Callable[[Examples], np.ndarray],
    *,
    steps: int = 50,
    l2: float = 1e-4,
) -> float:
    """Full-batch L-BFGS on standardised features."""
    x, x_test = features(data.train), features(data.test)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation[deviation == 0] = 1
    weights, bias = _fit((x - mean) / deviation, data.train.labels, data.num_classes, steps, l2)
    guesses = ((x_test - mean) / deviation @ weights + bias).argmax(axis=1)
    return float(np.mean(data.test.labels == guesses))


def _first_tokens(examples: Examples) -> np.ndarray:
    return examples.tokens[examples.offsets[:-1]]


def _counts(examples: Examples, vocabulary_size: int, with_first_token: bool) -> np.ndarray:
    """`(n, features)` float32; column 0, which no token uses, holds the log length."""
    lengths = np.diff(examples.offsets)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    cells = rows * vocabulary_size + examples.tokens
    counts = np.bincount(cells, minlength=len(lengths) * vocabulary_size)
    features = counts.reshape(len(lengths), vocabulary_size) / lengths[:, None]
    features[:, 0] = np.log(lengths)
    if examples.parts > 1:
        a, b = (features[i :: examples.parts] for i in range(2))
        features = np.concatenate([a, b, np.abs(a - b)], axis=1)
    if with_first_token:
        first = _first_tokens(examples)[:, None] == np.arange(vocabulary_size)[None]
        features = np.concatenate([features, first], axis=1)
    return features.astype(np.float32)


def _stretches(examples: Examples, longest: int, most: int = 256) -> np.ndarray:
    """`(n, features)` float32: means of stretches, 0 where a row has ended, mean and deviation."""
    edges = np.linspace(0, longest, min(longest, most if longest > 1024 else 1024) + 1).astype(int)
    rows = []
    for start, end in pairwise(examples.offsets):
        values = examples.as_inputs(examples.tokens[start:end])
        padded = np.zeros((longest, values.shape[1]), np.float32)
        padded[: len(values)] = values
        means = np.add.reduceat(padded, edges[:-1], axis=0) / np.diff(edges)[:, None]
        rows.append(np.concatenate([means.ravel(), values.mean(axis=0), values.std(axis=0)]))
    return np.array(rows, np.float32)


def _fit(
    x: np.ndarray, labels: np.ndarray, num_classes: int, steps: int, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(features, classes)` and bias `(classes,)` of least cross-entropy."""
    inputs, targets = jnp.asarray(x), jnp.asarray(labels)

    def loss(parameters: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, bias = parameters
        logits = inputs @ weights + bias[None]
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return errors.mean() + l2 * jnp.sum(weights**2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        parameters, state = carry
        value, grad = value_and_grad(parameters, state=state)
        updates, state = solver.update(
            grad, state, parameters, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(parameters, updates), state

    start = (jnp.zeros((x.shape[1], num_classes)), jnp.zeros(num_classes))
    fit = jax.jit(lambda: jax.lax.fori_loop(0, steps, step, (start, solver.init(start))))
    (weights, bias), _ = fit()
    return np.asarray(weights), np.asarray(bias)


@dataclasses.dataclass(frozen=True)
class Args(Checked):
    """Prints the baselines of a task as JSON."""

    task: (
        Annotated[ListOpsConfig, tyro.conf.subcommand("listops")]
        | Annotated[TextConfig, tyro.conf.subcommand("text")]
        | Annotated[RetrievalConfig, tyro.conf.subcommand("retrieval")]
        | Annotated[CifarConfig, tyro.conf.subcommand("cifar")]
        | Annotated[PathfinderConfig, tyro.conf.subcommand("pathfinder")]
        | Annotated[MnistConfig, tyro.conf.subcommand("mnist")]
        | Annotated[SpeechConfig, tyro.conf.subcommand("speech")]
    )
    cache_dir: Path
    """Where prepared data are kept."""
    data_dir: Path | None = None
    """Where the raw data are; see `seqmodels.data.lra.load`."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def report(args: Args) -> None:
    """Prints the baselines; raises as `seqmodels.data.lra.load` does, before any work if it can."""
    if not getattr(args.task, "test", 1):
        raise ValueError("test=0 leaves nothing to test on")
    data = load(args.task, cache_dir=args.cache_dir, data_dir=args.data_dir)
    report = {
        "name": data.name,
        "config": dataclasses.asdict(args.task),
        "examples": {split: len(examples) for split, examples in data.splits.items()},
        "accuracy": baselines(data),
    }
    print(json.dumps(report, indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    prefixes = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    return run_command(
        Args,
        report,
        arguments,
        description=__doc__,
        prog="experiments.lra.baselines",
        config=prefixes,
    )


if __name__ == "__main__":
    sys.exit(main())
