"""Whether an op's time is flat in the length of its rows."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from experiments.kernels.results import TIMED, Result, Target
from experiments.kernels.timing import milliseconds


def equal_tokens(
    shape: Any,
    lengths: tuple[int, ...],
    repetitions: int,
    *,
    program: Callable[[Any], Callable[..., Any]],
    arguments: Callable[[Any], tuple[Any, ...]],
    description: str,
) -> Result:
    """The same number of tokens as rows of different lengths, forward and backward.

    Args:
      shape: a family's `Shape`; its `batch * length` tokens are cut into rows of each length.
      lengths: of the rows; each divides the number of tokens.
      repetitions: interleaved, see `milliseconds`.
      program: of a shape, the function to jit.
      arguments: of a shape, what that function takes.
      description: of `shape`, for the row.
    """
    compiled = {}
    for length in lengths:
        batch = shape.batch * shape.length // length
        chosen = dataclasses.replace(shape, batch=batch, length=length)
        run = functools.partial(jax.jit(program(chosen)), *arguments(chosen))
        compiled[f"{batch} x {length} ms"] = run
    figures = milliseconds(compiled, (), repetitions)
    return Result(
        case="forward+backward, equal tokens",
        device=jax.devices()[0].device_kind,
        kind=TIMED,
        shape=description,
        figures=figures,
        ratios={"the fastest length": max(figures.values()) / min(figures.values())},
        targets={"the fastest length": Target("at most", 1.2)},
    )
