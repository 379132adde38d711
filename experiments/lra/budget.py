"""Chooses the number of training steps that fill a given time on the machine at hand."""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.lra.experiment import ExperimentConfig
from experiments.lra.pretrain import split
from experiments.lra.run import make_task
from experiments.run import read_object
from seqmodels.data import batches
from seqmodels.data.examples import TaskData
from seqmodels.parallel.mesh import put_batch
from seqmodels.training.evaluation import PerShape
from seqmodels.training.metrics import write_atomically
from seqmodels.training.state import create_state, optimizer_of
from seqmodels.training.step import make_train_step
from seqmodels.training.task import Task

EVALUATIONS = 5
"""Evaluations of a run, and at least as many checkpoints."""

REPEATS = 5
"""Steps that are timed for each padded length."""

# Shares of a step's time and of its compilation that evaluating a batch takes.
_FORWARD = 1 / 3
# Seconds between two checkpoints, about what a killed run loses.
_BETWEEN_CHECKPOINTS = 60.0
# A run stops at this multiple of its budget, should the machine have become so much slower.
_PATIENCE = 1.5


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the number of steps was chosen from; in results under "budget".

    Attributes:
      minutes: asked for; compiling and evaluating count.
      steps: chosen.
      seconds_per_step: timed, the mean over the batches of an epoch.
      compile_seconds: of the training step, for all padded lengths.
    """

    minutes: float
    steps: int
    seconds_per_step: float
    compile_seconds: float

    def write(self, run_dir: Path) -> None:
        """Leaves it in a run's directory, as budget.json."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_atomically(run_dir / "budget.json", text)

    @classmethod
    def read(cls, run_dir: Path) -> "Budget | None":
        """The run's; None if it has none."""
        path = run_dir / "budget.json"
        return cls(**read_object(path)) if path.exists() else None


def timed(config: ExperimentConfig, data: TaskData, minutes: float) -> Budget:
    """Times a few steps of each padded length."""
    shares, examples = _shares(config, data)
    seconds, compiling = _step_seconds(config, make_task(config), examples)
    step = sum(share * seconds[length] for length, share in shares.items())
    validating = -(-len(data.validation) // config.train.batch_size) * step * _FORWARD
    left = 60 * minutes - compiling * (1 + _FORWARD) - EVALUATIONS * validating
    return Budget(minutes, max(int(left / step), EVALUATIONS), step, compiling)


def planned(config: ExperimentConfig, budget: Budget) -> ExperimentConfig:
    """The experiment with this number of steps, of which pretraining has its part."""
    config = split(config, budget.steps)
    train, steps = config.train, config.train.steps
    between = max(int(_BETWEEN_CHECKPOINTS / budget.seconds_per_step), 1)
    every = -(-steps // EVALUATIONS)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(
            train,
            eval_every=every,
            checkpoint_every=min(between, every),
            log_every=max(min(train.log_every, steps // 20), 1),
            max_minutes=_PATIENCE * budget.minutes,
        ),
    )


def _shares(
    config: ExperimentConfig, data: TaskData
) -> tuple[dict[int, float], dict[int, batches.Batch]]:
    """By padded length: the share of an epoch's batches, and one of them."""
    train = config.train
    source = batches.TrainBatches(data.train, train.batch_size, train.seed, config.lengths, 50)
    plan = source.plan(0)
    longest = np.minimum(data.train.lengths[plan].max(axis=1), config.lengths[-1])
    places = np.searchsorted(config.lengths, longest)
    shares = {config.lengths[place]: float(np.mean(places == place)) for place in set(places)}
    examples = {
        length: source[int(np.argmax(np.asarray(config.lengths)[places] == length))]
        for length in shares
    }
    return shares, examples


def _step_seconds(
    config: ExperimentConfig, task: Task, examples: dict[int, batches.Batch]
) -> tuple[dict[int, float], float]:
    """Seconds of a training step by padded length, and of compiling for all of them."""
    train = config.train
    mesh = train.mesh.make()
    state: Any = create_state(task, train, mesh)
    step = PerShape(
        make_train_step(
            task,
            optimizer_of(task, train),
            mesh,
            accumulate=train.accumulate,
            ema_decay=train.ema_decay,
            exchange=train.mesh.exchange,
        ),
        1,
    )
    seconds = {}
    for length, batch in examples.items():
        laps = []
        for _ in range(REPEATS + 1):
            compiled, start = step.seconds, time.perf_counter()
            state, metrics = step(state, put_batch(batch, mesh), jnp.asarray(True))
            metrics.sums.loss.block_until_ready()
            laps.append(time.perf_counter() - start - (step.seconds - compiled))
        seconds[length] = statistics.median(laps[1:])  # the first one after compiling is slower
    return seconds, step.seconds
