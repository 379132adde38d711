"""A row trained again, from its file alone, up to its first evaluation."""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import terminal
from experiments.lra.rows import Row
from experiments.lra.run import data_digest, eval_batches, load_data, make_task
from experiments.lra.train import CACHE
from experiments.run import absolute, history, validation
from seqmodels.config import to_dict
from seqmodels.data import batches
from seqmodels.training.loop import fit
from seqmodels.training.run_directory import open_run

SAME = ("python", "versions", "device", "devices", "processes", "cpu", "cpu_cores", "commit")
"""What of two environments must be equal for their numbers to be; neither may be "dirty"."""

LOSS, ACCURACY = 0.05, 0.03
"""The tolerance elsewhere: of the validation loss, relative, and of the accuracy.

Rounding grows: training that rounds otherwise goes another way, as with another seed.
"""


class _Reached(Exception):
    """The early evaluation has been made."""


def check(row: Row, *, data_dir: Path | None, cache_dir: Path | None, progress: bool) -> None:
    """Trains and compares; prints what came out.

    Args:
      row: which.
      data_dir: the original files, where the task has any.
      cache_dir: of prepared data; None for the usual one.
      progress: whether to draw a progress bar.

    Raises:
      ValueError: the file has no evaluation, the data are others, or the numbers differ by more
        than they may.
    """
    recorded = [record for record in row.result["curve"] if record["kind"] == "eval"]
    if not recorded:
        raise ValueError(f"{row.path} has no evaluation in its curve to compare with")
    if row.config.pretrain is not None:
        raise ValueError(f"{row.path} began with pretraining, which --check does not repeat")
    step = recorded[0]["step"]
    terminal.say(f"{row.name}: trains {step} of {row.steps} steps again")
    data = load_data(
        row.config,
        cache_dir=absolute(cache_dir or CACHE) or "",
        data_dir=absolute(data_dir),
        progress=progress,
    )
    digest = row.result["data"].get("digest")
    if data_digest(data) != digest:
        raise ValueError(f"the data are not those of {row.path}, whose digest is {digest!r}")
    with tempfile.TemporaryDirectory() as folder:
        again = _train(row, data, Path(folder) / "run", step, progress)
    compare(row.result, again, step)


def _train(row: Row, data: Any, run_dir: Path, step: int, progress: bool) -> dict[str, Any]:
    """``environment`` and ``curve`` of a run of the row's config that ends at this step."""
    config = row.config

    def stop(what: str, at: int) -> None:
        if what == "eval" and at >= step:
            raise _Reached

    train = batches.train_batches(
        data.train,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        lengths=config.lengths,
    )
    with contextlib.suppress(_Reached):
        fit(
            make_task(config),
            train,
            config.train,
            open_run(run_dir, to_dict(config)),
            validation=eval_batches(config, data.validation),
            show_progress=progress,
            on_event=stop,
        )
    return history(run_dir)


def compare(recorded: Mapping[str, Any], again: Mapping[str, Any], step: int) -> None:
    """Prints how far two runs agree up to a step.

    Args:
      recorded, again: ``environment`` and ``curve`` of each.
      step: of an evaluation that both have.

    Raises:
      ValueError: they differ, in the same environment at all, else by more than the tolerance.
    """
    before, now = recorded["environment"], again["environment"]
    other = [name for name in SAME if before.get(name) != now.get(name)]
    other += ["uncommitted changes"] if before.get("dirty") or now.get("dirty") else []
    old, new = (validation(run["curve"], step) for run in (recorded, again))
    expected, found = (
        [record for record in run["curve"] if record["step"] <= step] for run in (recorded, again)
    )
    equal = sum(a == b for a, b in zip(expected, found, strict=False))
    loss, old_loss, accuracy, old_accuracy = (
        float(record[name]) for name in ("loss", "accuracy") for record in (new, old)
    )
    terminal.say(
        f"step {step}: validation loss {loss:.6f} (recorded {old_loss:.6f}), accuracy "
        f"{accuracy:.4f} (recorded {old_accuracy:.4f}); {equal} of {len(expected)} records equal "
        "to the bit"
    )
    if found == expected:
        terminal.say("reproduced to the bit")
        return
    if not other:
        raise ValueError(f"step {step} differs from what was recorded in the same environment")
    loss = abs(loss - old_loss) / max(abs(old_loss), 1e-9)
    accuracy = abs(accuracy - old_accuracy)
    how = f"loss differs by {100 * loss:.2f} %, accuracy by {accuracy:.4f}"
    limits = f"within {100 * LOSS:.0f} % and {ACCURACY}"
    if not (loss <= LOSS and accuracy <= ACCURACY):
        raise ValueError(f"step {step}: {how}, not {limits}; other: {', '.join(other)}")
    terminal.say(f"reproduced {limits}: {how}; not to the bit, other: {', '.join(other)}")
