"""Evaluation over a whole split."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from seqmodels.parallel.mesh import batch_sharding, put_batch
from seqmodels.training import processes
from seqmodels.training.task import Batch, Sums, Variables


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Weighted means over a split; ``examples`` is the sum of the weights."""

    loss: float
    accuracy: float
    examples: float

    def score(self, select: str) -> float:
        """What the best checkpoint has most of: "accuracy", or minus the "loss"."""
        return self.accuracy if select == "accuracy" else -self.loss


class PerShape:
    """A jitted function compiled ahead for each new batch shape, so that compiling can be timed.

    Args:
      function: jitted.
      batch_argument: position of the batch among its arguments.
    """

    def __init__(self, function: Any, batch_argument: int) -> None:
        self._function = function
        self._batch_argument = batch_argument
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        batch = arguments[self._batch_argument]
        key = tuple(sorted((name, value.shape) for name, value in batch.items()))
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = self._function.lower(*arguments).compile()
            self.seconds += time.perf_counter() - start
            processes.gather("")  # who compiles longer is waited for: the devices of CPUs would not
        return self._compiled[key](*arguments)


def evaluate(
    eval_step: Callable[[Variables, Batch, Any], tuple[Sums, Any]],
    variables: Variables,
    batches: Iterable[Batch],
    mesh: Mesh,
    start: Callable[[int], Any] = lambda rows: None,
) -> Evaluation:
    """Sums the step's results over all batches, exactly as often as run the same numbers.

    Args:
      eval_step: see ``make_eval_step``.
      variables: the model's.
      batches: with a carry, batches that continue one another.
      mesh: where they go.
      start: ``start(rows)`` is the carry before the first batch, see ``Task.start``.

    Raises:
      ValueError: the batches hold no example of positive weight.
    """
    loss = correct = weight = 0.0
    waiting: Sums | None = None
    carry: Any = None

    def add(sums: Sums) -> None:
        nonlocal loss, correct, weight
        host = jax.device_get(sums)
        loss += float(host.loss)
        correct += float(host.correct)
        weight += float(host.weight)

    for number, batch in enumerate(batches):
        placed = put_batch(batch, mesh)
        if number == 0:
            rows = len(next(iter(placed.values())))
            carry = jax.device_put(start(rows), batch_sharding(mesh))
        # The device works on this batch while the last one's sums are read.
        following, carry = eval_step(variables, placed, carry)
        if waiting is not None:
            add(waiting)
        waiting = following
    if waiting is not None:
        add(waiting)
    if weight == 0:
        raise ValueError("there are no examples to evaluate: all weights are 0")
    return Evaluation(loss=loss / weight, accuracy=correct / weight, examples=weight)
