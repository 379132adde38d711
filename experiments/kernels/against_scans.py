"""An op against the recurrence step by step, which `jax.lax.scan` differentiates."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.kernels.results import TIMED, Result, Target
from experiments.kernels.timing import medians


def against_scans(
    programs: Mapping[str, Callable[..., Any]],
    args: tuple[Any, ...],
    repetitions: int,
    description: str,
    targets: Mapping[str, Target] | None = None,
) -> Result:
    """Forward and backward here and now, all gradients; `ratios["scan"]` is to the fastest scan.

    Args:
      programs: to jit; the op first, scans by names that begin with "scan".
      args: what all of them take.
      repetitions: interleaved, see `timing.milliseconds`.
      description: of the shape, for the row.
      targets: of "scan".
    """
    figures = medians(programs, args, repetitions)
    scan = min(value for name, value in figures.items() if name.startswith("scan"))
    return Result(
        case="forward+backward",
        device=jax.devices()[0].device_kind,
        kind=TIMED,
        shape=description,
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios={"scan": scan / figures[next(iter(programs))]},
        targets=dict(targets or {}),
    )
