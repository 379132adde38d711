"""An S5 layer with both directions, forward and backward, and with `associative_scan` in it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from experiments.kernels.baselines import linear_scan as baselines
from experiments.kernels.results import TIMED, Result, Target
from experiments.kernels.s5_step import scanned
from experiments.kernels.timing import check_equal, milliseconds
from seqmodels.mixers import S5Config, build


def programs(
    config: S5Config, width: int, x: jax.Array, seed: int
) -> tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]:
    """Compiled `(params, x) -> gradients of sum(y ** 2) / 2` by name, and their arguments."""
    layer = build(config, width)
    params = jax.jit(layer.init)(jax.random.key(seed), x[:, :2])["params"]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return (layer.apply({"params": params}, x)[0] ** 2).sum() / 2

    contexts: dict[str, AbstractContextManager[Any]] = {
        "seqmodels": nullcontext(),
        "associative_scan": scanned(baselines.associative_scan),
    }
    compiled: dict[str, Callable[..., Any]] = {}
    for name, context in contexts.items():
        with context:  # a new function each time, for jax remembers what it has traced
            step = jax.jit(lambda *args: jax.grad(loss, argnums=(0, 1))(*args))
            compiled[name] = step.lower(params, x).compile()
    return compiled, (params, x)


def results(
    repetitions: int,
    seed: int,
    batch: int = 8,
    length: int = 2048,
    width: int = 128,
    states: tuple[int, ...] = (128, 64),
) -> Iterator[Result]:
    """A row for each number of complex states: 128, and the 64 that are left of 128 in pairs."""
    x = jax.random.normal(jax.random.key(seed), (batch, length, width))
    for size in states:
        config = S5Config(state_size=2 * size, blocks=1, bidirectional=True)
        compiled, args = programs(config, width, x, seed)
        ours, theirs = (jax.device_get(run(*args)) for run in compiled.values())
        check_equal(ours, theirs, "associative_scan")
        figures = milliseconds(compiled, args, repetitions)
        ratio = figures["associative_scan"] / figures["seqmodels"]
        yield Result(
            case="S5 layer, both directions, forward+backward",
            device=jax.devices()[0].device_kind,
            kind=TIMED,
            shape=f"batch {batch}, length {length}, width {width}, {size} complex states, float32",
            figures={f"{name} ms": value for name, value in figures.items()},
            ratios={"associative_scan": ratio},
            targets={"associative_scan": Target("at least", 2.0)},
        )
