"""What predictors without any sequence model reach on a task: the figures a model has to beat.

python -m experiments.lra.baselines listops --cache-dir ~/.cache/seqmodels
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.command_line import run_command
from seqmodels.data.examples import Examples, TaskData
from seqmodels.data.lra import ListOpsConfig, TextConfig, load
from seqmodels.ranges import Checked


def baselines(data: TaskData) -> dict[str, float]:
    """Test accuracies, in 0 .. 1, of four predictors fitted to the training split.

    - `majority`: the most frequent label.
    - `first_token`: the most frequent label among the sequences that begin with the same token; on
      ListOps, the outermost operator.
    - `token_counts`: multinomial logistic regression on how often each token occurs.
    - `first_token_and_counts`: the same, given the first token as well.
    """
    return {
        "majority": majority(data),
        "first_token": first_token(data),
        "token_counts": token_counts(data),
        "first_token_and_counts": token_counts(data, with_first_token=True),
    }


def majority(data: TaskData) -> float:
    guess = np.bincount(data.train.labels, minlength=data.num_classes).argmax()
    return float(np.mean(data.test.labels == guess))


def first_token(data: TaskData) -> float:
    """A first token that training does not know gets the most frequent label of all."""
    votes = np.zeros((data.vocabulary_size, data.num_classes), np.int64)
    np.add.at(votes, (_first_tokens(data.train), data.train.labels), 1)
    overall = votes.sum(axis=0).argmax()
    guesses = np.where(votes.any(axis=1), votes.argmax(axis=1), overall)
    return float(np.mean(data.test.labels == guesses[_first_tokens(data.test)]))


def token_counts(
    data: TaskData, *, with_first_token: bool = False, steps: int = 50, l2: float = 1e-4
) -> float:
    """Full-batch L-BFGS on each token's share of the sequence and the length, standardised."""
    x, x_test = (
        _features(examples, data.vocabulary_size, with_first_token)
        for examples in (data.train, data.test)
    )
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation[deviation == 0] = 1
    weights, bias = _fit((x - mean) / deviation, data.train.labels, data.num_classes, steps, l2)
    guesses = ((x_test - mean) / deviation @ weights + bias).argmax(axis=1)
    return float(np.mean(data.test.labels == guesses))


def _first_tokens(examples: Examples) -> np.ndarray:
    return examples.tokens[examples.offsets[:-1]]


def _features(examples: Examples, vocabulary_size: int, with_first_token: bool) -> np.ndarray:
    """`(n, features)` float32; column 0, which no token uses, holds the log length."""
    rows = np.repeat(np.arange(len(examples)), examples.lengths)
    cells = rows * vocabulary_size + examples.tokens
    counts = np.bincount(cells, minlength=len(examples) * vocabulary_size)
    features = counts.reshape(len(examples), vocabulary_size) / examples.lengths[:, None]
    features[:, 0] = np.log(examples.lengths)
    if with_first_token:
        first = _first_tokens(examples)[:, None] == np.arange(vocabulary_size)[None]
        features = np.concatenate([features, first], axis=1)
    return features.astype(np.float32)


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
    )
    cache_dir: Path
    """Where prepared data are kept."""
    data_dir: Path | None = None
    """Where the raw data are; see `seqmodels.data.lra.load`."""
    traceback: bool = False
    """Show the whole traceback of an error."""


def report(args: Args) -> None:
    """Prints the baselines; raises as `seqmodels.data.lra.load` does, before any work if it can."""
    if isinstance(args.task, ListOpsConfig) and not args.task.test:
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
