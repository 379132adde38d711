"""Wall time of several programs on the same inputs, as medians of interleaved repetitions."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def medians(
    programs: Mapping[str, Callable[..., Any]], args: tuple[Any, ...], repetitions: int
) -> dict[str, float]:
    """`milliseconds` of functions that compute the same; they are jitted, and compared first.

    Raises:
      AssertionError: the output of one is not that of the first.
    """
    jitted = {name: jax.jit(program) for name, program in programs.items()}
    outputs = {name: jax.device_get(run(*args)) for name, run in jitted.items()}
    first, *others = outputs
    for name in others:
        check_equal(outputs[first], outputs[name], name)
    return milliseconds(jitted, args, repetitions)


def milliseconds(
    compiled: Mapping[str, Callable[..., Any]], args: tuple[Any, ...], repetitions: int
) -> dict[str, float]:
    """Median time of each compiled function on `args`.

    In each repetition all run in turn, so that a disturbance of the machine meets them alike. Each
    runs three times and the last run counts: a program that frees gigabytes makes the allocator
    give them back to the system, and whoever comes next would pay for the pages (measured: 180 ms,
    then 105, then 96 for good), which a loop of training steps does not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repetitions):
        for name, run in compiled.items():
            for _ in range(2):
                jax.block_until_ready(run(*args))
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def check_equal(expected: Any, actual: Any, name: str, tolerance: float = 1e-3) -> None:
    """Compares trees of arrays by the RMSE over the RMS of each leaf.

    Raises:
      AssertionError: they differ by more than `tolerance`.
    """
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        error = np.sqrt(np.mean(np.abs(x - y) ** 2) / np.mean(np.abs(x) ** 2))
        if not error <= tolerance:
            raise AssertionError(f"{name} computes something else: relative error {error:.2e}")
