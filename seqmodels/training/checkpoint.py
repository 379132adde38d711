"""Checkpoints: asynchronous, atomic, the latest and the best.

One step's directory holds the state and the position (data iterator, counters); the directory
appears under its name only when it is complete, so a killed process leaves either all or nothing.
"""

import dataclasses
import errno
import gc
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from seqmodels.training.config import RESUMABLE
from seqmodels.training.errors import CheckpointError
from seqmodels.training.state import TrainState

METRIC = "validation_score"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"steps": 3}}`` -> ``{"train.steps": 3}``."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What keeps a checkpoint of config ``saved`` from being continued with ``wanted``.

    Fields whose paths, or the beginnings of them, are in ``RESUMABLE`` may differ.
    """
    # Through JSON, so that a tuple equals the list it was stored as.
    old, new = flatten(json.loads(json.dumps(saved))), flatten(json.loads(json.dumps(wanted)))
    return [
        f"{name}={new.get(name)!r} (saved: {old.get(name)!r})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _resumable(name)
    ]


def _resumable(path: str) -> bool:
    return any(f"{path}.".startswith(f"{field}.") for field in RESUMABLE)


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[METRIC]


def _storable(state: TrainState) -> TrainState:
    return dataclasses.replace(state, rng=jax.random.key_data(state.rng))


class Checkpoints:
    """The checkpoints of one run, in ``directory/<step>``.

    Keeps the ``max_to_keep`` latest ones and, of those saved with a score, the best one. Use it as
    a context manager: leaving it waits for a save under way.
    """

    def __init__(
        self,
        directory: Path,
        config_dict: Mapping[str, Any],
        *,
        max_to_keep: int = 2,
        read_only: bool = False,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.config_dict = config_dict
        # Orbax logs every phase of every save, and failures that are raised here anyway.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        preserve: Any = policies.AnyPreservationPolicy(
            [
                policies.LatestN(max_to_keep),
                policies.BestN(
                    get_metric_fn=_score,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else preserve,
            best_fn=_score,  # without it orbax does not store the metrics
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=("state", "position", "config")
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot open the checkpoints in {self.directory}: {_reason(error)}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self._manager.close()
            if error is not None:
                gc.collect()  # orbax's failed coroutines complain if the interpreter ends first

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, position: Mapping[str, Any], *, score: float | None = None
    ) -> None:
        """Starts to save; returns when the state is copied. Saves of one step happen once.

        Args:
          state: any state; the caller may donate it afterwards.
          position: JSON-able; where the data is and what was counted so far.
          score: see ``Evaluation.score``; the best checkpoint is the one with the highest.

        Raises:
          CheckpointError: this save cannot start, or the one before it failed.
        """
        step = int(state.step)
        self.wait()
        if step in self._manager.all_steps():
            return
        # On the CPU a host array may be a view of the device's, which the next step overwrites.
        copy = jax.tree.map(lambda x: x.copy(), _storable(state))
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(copy),
                    position=ocp.args.JsonSave(dict(position)),
                    config=ocp.args.JsonSave(dict(self.config_dict)),
                ),
                metrics=None if score is None else {METRIC: score},
                force=True,
            )
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until the save under way is complete.

        Raises:
          CheckpointError: it failed; earlier checkpoints are intact.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises CheckpointError if a save under way has failed already; does not wait."""
        try:
            self._manager.check_for_errors()
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"could not write a checkpoint to {self.directory} ({_reason(error)}); earlier "
            "checkpoints are intact: make room and continue with --resume"
        )

    def latest(self) -> int:
        """The latest step.

        Raises:
          CheckpointError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"there is no complete checkpoint in {self.directory}")
        return steps[-1]

    def restore(self, template: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state and the position saved at ``step``.

        Args:
          template: the state's shapes, dtypes and shardings, see ``state.abstract_state``.
          step: one of ``steps()``.

        Raises:
          CheckpointError: no such step, another config, or a file that cannot be read.
        """
        if step not in self.steps():
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self.directory}; "
                f"there are {', '.join(map(str, self.steps())) or 'none'}"
            )
        abstract = jax.tree.map(
            lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
            jax.eval_shape(_storable, template),
            template,
        )
        try:
            config = self._manager.restore(
                step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
            ).config
            self._check(config)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    position=ocp.args.JsonRestore(),
                ),
            )
        except CheckpointError:
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise CheckpointError(
                f"cannot read the checkpoint {self.directory / str(step)}: {_reason(error)}"
            ) from error
        state = dataclasses.replace(
            restored.state, rng=jax.random.wrap_key_data(restored.state.rng)
        )
        return state, restored.position

    def _check(self, saved: Mapping[str, Any]) -> None:
        different = differences(saved, self.config_dict)
        if different:
            raise CheckpointError(
                f"the checkpoints in {self.directory} belong to another config: "
                f"{'; '.join(different)}. Use the saved values, or start in another run directory"
            )


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if os.strerror(errno.ENOSPC) in text:
        return os.strerror(errno.ENOSPC)
    return text.splitlines()[0][:300] if text else type(error).__name__
