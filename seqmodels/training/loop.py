"""The training loop: from a task, batches and a config to a run directory."""

import contextlib
import dataclasses
import hashlib
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from seqmodels.parallel.mesh import put_batch, replicated, rows_of_process
from seqmodels.training import processes
from seqmodels.training.checkpoint import Checkpoints
from seqmodels.training.config import TrainConfig
from seqmodels.training.errors import Interrupted, NonFiniteError
from seqmodels.training.evaluation import Evaluation, PerShape, evaluate
from seqmodels.training.metrics import JsonLines, MetricsWriter, NoMetrics, truncate_jsonl
from seqmodels.training.optimizer import schedule
from seqmodels.training.run_directory import Run
from seqmodels.training.state import TrainState, abstract_state, create_state, optimizer_of
from seqmodels.training.step import StepMetrics, make_eval_step, make_train_step
from seqmodels.training.task import Batch, Task

# tqdm's own, less the steps a second: with them, tokens/s do not fit in 80 columns.
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_OUT_OF_TIME = 1  # what asks to stop, beside the numbers of SIGINT and SIGTERM

OnEvent = Callable[[str, int], None]
"""Called with what was just done ("prepared", "step", "log", "eval", "save", "saved") and the step.

"save": a save has started; "saved": the last one is complete.
"""


@runtime_checkable
class BatchIterator(Protocol):
    """Endless batches with a JSON-able position, as grain's iterators have it."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass
class Window:
    """Sums since the last logged line."""

    loss: float = 0.0
    correct: float = 0.0
    weight: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class Progress:
    """What a run has done up to ``step``; stored as JSON in each checkpoint."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    order: str = ""
    best_step: int | None = None
    best_score: float | None = None
    wall_seconds: float = 0.0
    compile_seconds: float = 0.0
    window: Window = dataclasses.field(default_factory=Window)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Progress":
        return cls(**{**data, "window": Window(**data["window"])})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      progress: counters at the end.
      complete: all steps were made; False when ``max_minutes`` ended the run.
      parameters: the model's number of parameters.
      chosen_step: the step whose checkpoint to test: the best on validation, or the last.
    """

    progress: Progress
    complete: bool
    parameters: int

    @property
    def chosen_step(self) -> int:
        best = self.progress.best_step
        return self.progress.step if best is None else best


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step that the device may still be working on."""

    step: int
    data_before: Any
    metrics: StepMetrics


def fit(
    task: Task,
    batches: Iterable[Batch],
    config: TrainConfig,
    run: Run,
    *,
    validation: Iterable[Batch] | None = None,
    mesh: Mesh | None = None,
    show_progress: bool = True,
    on_event: OnEvent | None = None,
) -> Outcome:
    """Trains and leaves everything in the run's directory (see ``run_directory``).

    A run that was killed at any moment and resumed gives the same parameters and metrics, bit for
    bit, as one that was not; only the fields in ``metrics.TIMING_FIELDS`` differ. So do several
    processes that are killed and started again; the first of them writes the metrics, all of them
    the checkpoints, which any other number of processes or devices can go on from.

    Args:
      task: the model.
      batches: ``iter(batches)`` is a ``BatchIterator``. A batch is a dict of arrays ``(B, ...)``
        with "index" ``(B,)`` (which examples) and what the task needs; "segment_ids", where there
        is one, counts the real tokens. With several processes a batch has the rows that
        ``rows_of_process`` gives to this one.
      config: how to train.
      run: its directory, its config, and whether it goes on; see ``open_run``.
      validation: batches evaluated every ``eval_every`` steps and at the end; may be None where
        the last checkpoint is selected.
      mesh: default: made from ``config.mesh``.
      show_progress: whether to draw a progress bar.
      on_event: called with ``(what, step)`` in the thread of the loop.

    Raises:
      CheckpointError: see there.
      NonFiniteError: a loss or gradient was not finite and ``config.on_nan`` is "stop".
      Interrupted: SIGTERM or SIGINT; the step was finished and saved.
      ValueError: the config does not fit the model or the devices, is not that of the other
        processes, or selects by a validation that is not there.
    """
    if validation is None and config.select != "last":
        raise ValueError(
            f"select={config.select!r} needs validation batches; give some, or take select='last'"
        )
    if mesh is None:
        mesh = config.mesh.make()
    rows_of_process(mesh, config.batch_size)  # raises where they do not divide
    run_dir, resume = run.directory, run.resume
    first = processes.is_first()
    processes.require_equal(
        {"config": run.config_dict, "run_dir": str(run_dir.absolute()), "resume": resume},
        "start all processes with the same command, but for --distributed.process",
    )
    if first:
        run.prepare()
    tell = on_event or (lambda what, step: None)
    tell("prepared", 0)
    iterator: Any = iter(batches)
    with Checkpoints(
        run_dir / "checkpoints", run.config_dict, max_to_keep=config.keep
    ) as checkpoints:
        progress = Progress()
        processes.require_equal(
            {"checkpoints": checkpoints.steps()},
            f"all processes need {run_dir} in a file system that they share",
        )
        if resume and checkpoints.steps():
            template = abstract_state(task, config, mesh)
            state, position = checkpoints.restore(template, checkpoints.latest())
            progress = Progress.from_json(position["progress"])
            iterator.set_state(position["data"])
        else:
            state = create_state(task, config, mesh)
        if resume and first:
            truncate_jsonl(run_dir / "nonfinite.jsonl", progress.step)
        train_step = make_train_step(
            task,
            optimizer_of(task, config),
            mesh,
            accumulate=config.accumulate,
            skip_non_finite=config.on_nan == "skip",
            ema_decay=config.ema_decay,
            exchange=config.mesh.exchange,
        )
        with (
            _metrics_writer(run_dir, progress.step if resume else None) as writer,
            _stop_signals() as stop,
            tqdm(
                total=config.steps,
                initial=progress.step,
                unit="step",
                disable=not (show_progress and first),
                dynamic_ncols=True,
                bar_format=BAR_FORMAT,
                mininterval=0.1 if sys.stderr.isatty() else 30,
            ) as bar,
        ):
            loop = _Loop(
                task=task,
                config=config,
                run_dir=run_dir,
                mesh=mesh,
                iterator=iterator,
                validation=validation,
                train_step=PerShape(train_step, 1),
                eval_step=PerShape(make_eval_step(task, mesh, config.mesh.exchange), 1),
                state=state,
                progress=progress,
                checkpoints=checkpoints,
                writer=writer,
                bar=bar,
                stop=stop,
                on_event=tell,
            )
            return loop.run()


def _metrics_writer(run_dir: Path, resume_step: int | None) -> MetricsWriter | NoMetrics:
    return MetricsWriter(run_dir, resume_step) if processes.is_first() else NoMetrics()


@dataclasses.dataclass
class _Loop:
    """The loop's moving parts; ``state`` may be one step ahead of ``progress``."""

    task: Task
    config: TrainConfig
    run_dir: Path
    mesh: Mesh
    iterator: BatchIterator
    validation: Iterable[Batch] | None
    train_step: PerShape
    eval_step: PerShape
    state: TrainState
    progress: Progress
    checkpoints: Checkpoints
    writer: MetricsWriter | NoMetrics
    bar: Any
    stop: list[int]
    on_event: OnEvent

    def __post_init__(self) -> None:
        self.pending: deque[_Pending] = deque()
        self.rate = schedule(self.config, self.config.learning_rate)
        self.proceed = jax.device_put(np.asarray(True), replicated(self.mesh))
        self.votes = processes.Votes(self.mesh)
        self.started = time.perf_counter() - self.progress.wall_seconds
        self.compiled_before = self.progress.compile_seconds

    def run(self) -> Outcome:
        step = self.progress.step
        self._restart_clock()
        while step < self.config.steps:
            step += 1
            self._dispatch(step)
            asked = self.votes.largest(self._asks())  # once: a later signal waits for the next step
            last = asked != 0 or step == self.config.steps
            evaluates = step % self.config.eval_every == 0 or step == self.config.steps
            saves = step % self.config.checkpoint_every == 0 or last
            # Reading a step's result one step late keeps the device busy.
            while len(self.pending) > (0 if evaluates or saves else 1):
                self._finish(self.pending.popleft())
            if evaluates or saves:
                self._at_boundary(evaluates, saves)
            if asked > _OUT_OF_TIME:
                self._interrupt(asked)
            if last:
                break
        self.checkpoints.wait()
        self.on_event("saved", step)
        return Outcome(
            progress=self.progress,
            complete=step >= self.config.steps,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
        )

    def _at_boundary(self, evaluates: bool, saves: bool) -> None:
        """Evaluates and saves; nothing is under way, state and progress agree."""
        score = None
        if evaluates and self.validation is not None:
            score = self._evaluate(self.validation)
        if saves or score is not None:
            self._save(data=self.iterator.get_state(), score=score)
        self._restart_clock()

    def _evaluate(self, validation: Iterable[Batch]) -> float | None:
        """Logs an evaluation; the score if it is the best so far."""
        progress = self.progress
        result: Evaluation = evaluate(
            self.eval_step, self.state.averaged, validation, self.mesh, self.task.start
        )
        self.writer.write("eval", progress.step, dataclasses.asdict(result) | self._timing())
        self._say(
            f"step {progress.step}: validation loss {result.loss:.4f}, "
            f"accuracy {result.accuracy:.4f}"
        )
        self.on_event("eval", progress.step)
        if self.config.select == "last":
            return None
        score = result.score(self.config.select)
        if progress.best_score is not None and score <= progress.best_score:
            return None
        progress.best_step, progress.best_score = progress.step, score
        return score

    def _save(self, data: Any, score: float | None = None) -> None:
        """Starts to save; metrics up to here reach the disk first."""
        self._timing()
        self.writer.sync()
        position = {"progress": self.progress.to_json(), "data": data}
        self.checkpoints.save(self.state, position, score=score)
        self.on_event("save", self.progress.step)

    def _interrupt(self, number: int) -> None:
        self.checkpoints.wait()
        raise Interrupted(
            number,
            f"{signal.Signals(number).name}: stopped after step {self.progress.step}, the "
            f"checkpoint is in {self.run_dir}; continue with --resume",
        )

    def _asks(self) -> int:
        """The signal that asks this process to stop, or ``_OUT_OF_TIME``; 0 to go on."""
        if self.stop:
            return self.stop[0]
        limit = self.config.max_minutes
        over = limit is not None and time.perf_counter() - self.started > 60 * limit
        return _OUT_OF_TIME if over else 0

    def _say(self, text: str) -> None:
        if processes.is_first():
            self.bar.write(text)

    def _timing(self) -> dict[str, float]:
        """Wall and compile time so far, over all starts of the run."""
        self.progress.wall_seconds = time.perf_counter() - self.started
        self.progress.compile_seconds = (
            self.compiled_before + self.train_step.seconds + self.eval_step.seconds
        )
        return {
            "wall_seconds": self.progress.wall_seconds,
            "compile_seconds": self.progress.compile_seconds,
        }

    def _restart_clock(self) -> None:
        """Leaves the time since the last step out of tokens/s."""
        self.clock, self.compiled = time.perf_counter(), self.train_step.seconds

    def _lap(self) -> float:
        """Training seconds since the last lap, without compiling."""
        seconds = time.perf_counter() - self.clock - (self.train_step.seconds - self.compiled)
        self._restart_clock()
        return seconds

    def _dispatch(self, step: int) -> None:
        """Hands the next batch to the device without waiting for the result."""
        data_before = self.iterator.get_state()
        batch = next(self.iterator)
        self.state, metrics = self.train_step(self.state, put_batch(batch, self.mesh), self.proceed)
        if self.config.on_nan == "stop":
            self.proceed = metrics.finite
        self.pending.append(
            _Pending(
                step=step,
                data_before=data_before,
                metrics=metrics,
            )
        )

    def _finish(self, done: _Pending) -> None:
        """Waits for a step and counts it."""
        metrics = jax.device_get(done.metrics)
        if not metrics.finite:
            self._not_finite(done, metrics)
        progress, window = self.progress, self.progress.window
        progress.step = done.step
        progress.tokens += int(metrics.tokens)
        progress.order = chain_digest(progress.order, metrics.index.tolist())
        window.tokens += int(metrics.tokens)
        if metrics.finite:
            window.loss += float(metrics.sums.loss)
            window.correct += float(metrics.sums.correct)
            window.weight += float(metrics.sums.weight)
            window.grad_norm += float(metrics.grad_norm)
            window.steps += 1
        window.seconds += self._lap()
        self.bar.update()
        self.on_event("step", done.step)
        if done.step % self.config.log_every == 0:
            self._log()

    def _not_finite(self, done: _Pending, metrics: StepMetrics) -> None:
        record = {
            "step": done.step,
            "index": metrics.index.tolist(),
            "loss": float(metrics.sums.loss / metrics.sums.weight),
            "grad_norm": float(metrics.grad_norm),
            "data": done.data_before,
        }
        path = self.run_dir / "nonfinite.jsonl"
        if processes.is_first():
            lines = JsonLines(path)
            lines.write(record)
            lines.sync()
            lines.close()
        what = (
            f"step {done.step}: loss {record['loss']}, gradient norm {record['grad_norm']}; the "
            f"batch is described in {path}"
        )
        if self.config.on_nan == "stop":
            # Neither this step nor the one already under way has changed the state.
            self.pending.clear()
            self._save(data=done.data_before)
            self.checkpoints.wait()
            raise NonFiniteError(
                f"not finite at {what}; the state before it is saved. A lower learning rate or "
                "clip_norm may help, on_nan=skip leaves such batches out"
            )
        self.progress.skipped += 1
        self._say(f"skipped a batch that is not finite at {what}")
        if self.progress.skipped > self.config.max_skips:
            raise NonFiniteError(f"more than max_skips={self.config.max_skips} skipped; {what}")

    def _log(self) -> None:
        """Writes the averages since the last line."""
        progress, window = self.progress, self.progress.window
        weight, steps = max(window.weight, 1e-9), max(window.steps, 1)
        values = {
            "loss": window.loss / weight if window.steps else float("nan"),
            "accuracy": window.correct / weight,
            "grad_norm": window.grad_norm / steps,
            "learning_rate": float(self.rate(progress.step - 1 - progress.skipped)),
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            "order": progress.order,
            **self._timing(),
            "tokens_per_second": window.tokens / max(window.seconds, 1e-9),
        }
        self.writer.write("train", progress.step, values)
        self.bar.set_postfix(
            {
                "loss": f"{values['loss']:.4f}",
                "acc": f"{values['accuracy']:.4f}",
                "tok/s": tqdm.format_sizeof(values["tokens_per_second"]),
            },
            refresh=False,
        )
        progress.window = Window()
        self.on_event("log", progress.step)
        self.checkpoints.check()


def chain_digest(previous: str, index: list[int]) -> str:
    """Digest of the order of all examples so far: equal digests, equal data order."""
    return hashlib.sha256(f"{previous}{index}".encode()).hexdigest()[:16]


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT; a second one acts as usual. Only in the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()
