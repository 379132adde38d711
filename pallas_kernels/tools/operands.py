"""One small call of every op, for what all ops have in common: tests, and the self-test."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.tools.families import FAMILIES

LENGTH = 6
# `B` stands for the batch and `L` for the length: every other size is fixed. Complex operands are
# named.
_U, _SMALL = ("B", "L", 4), (4, 2)
_Q, _HEADS = ("B", "L", 1, 4), ("B", "L", 2)
OPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "linear_scan": {"a": _U, "b": _U},
    "selective_scan": {"x": _U, "dt": _U, "A": _SMALL, "B": _HEADS, "C": _HEADS},
    "diagonal_ssm": {"u": _U, "log_a": _SMALL, "c": _SMALL},
    "causal_conv1d": {"x": _U, "weight": (3, 4)},
    "linear_attention": {"q": _Q, "k": _Q, "v": ("B", "L", 2, 4), "log_decay": _HEADS},
    "delta_rule": {
        "q": _Q, "k": _Q, "v": ("B", "L", 2, 4), "beta": _HEADS, "log_decay": (*_HEADS, 4),
    },
    "checkpoint_attention": {"q": ("B", "L", 2, 4), "k": _Q, "v": _Q},
    "long_conv": {"u": _U, "kernel": (4, "L")},
    "bidirectional_mimo_scan": {
        "u": _U, "decay": (3,), "input_projection": (4, 6), "output_projection": (12, 4),
    },
    # What is alike for all rows elsewhere: every direction has a C of its own.
    "s4_kernel": {
        "c": ("B", *_SMALL), "dt": (4,), "eigenvalues": _SMALL, "p": _SMALL, "b": _SMALL,
    },
}  # fmt: skip
_COMPLEX = {
    "diagonal_ssm": {"log_a", "c"},
    "bidirectional_mimo_scan": {"decay"},
    "s4_kernel": {"eigenvalues", "p", "b", "c"},
}
_AT_MOST_ZERO = {"log_a", "A", "log_decay", "eigenvalues"}
OPTIONS: dict[str, dict[str, Any]] = {
    "checkpoint_attention": {"interval": 2},
    "s4_kernel": {"length": "L"},
}
KERNELS = [name for name in OPS if FAMILIES[name].has_kernels]
PACKED = np.array([[1, 1, 2, 2, 2, 0]], np.int32)


def shapes(name: str, batch: Any, length: int = LENGTH) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Shape and dtype of each operand."""
    return {
        operand: (
            tuple({"B": batch, "L": length}.get(size, size) for size in sizes),
            "complex64" if operand in _COMPLEX.get(name, ()) else "float32",
        )
        for operand, sizes in OPS[name].items()
    }


def arrays(name: str, batch: int, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Random operands."""
    rng = np.random.default_rng(0)

    def draw(operand: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        x = rng.uniform(0.1, 0.9, shape)
        x = -x if operand in _AT_MOST_ZERO else x
        return (x + (1j * rng.standard_normal(shape) if dtype == "complex64" else 0)).astype(dtype)

    return {operand: draw(operand, *spec) for operand, spec in shapes(name, batch, length).items()}


def call(
    name: str, implementation: Any = None, packed: bool = True, length: int = LENGTH
) -> Callable[[dict[str, Any]], Any]:
    """`fn(operands) -> outputs` of an op, over several documents a row where it takes them."""
    op = getattr(pallas_kernels, name)
    packed = packed and "segment_ids" in inspect.signature(op).parameters
    options = {
        option: length if value == "L" else value for option, value in OPTIONS.get(name, {}).items()
    }
    op = functools.partial(op, implementation=implementation, **options)

    def run(operands: dict[str, Any]) -> Any:
        if not packed:
            return op(**operands)
        batch = operands[next(iter(OPS[name]))].shape[0]
        row = np.repeat(PACKED, -(-length // LENGTH), axis=1)[:, :length]
        ids = jnp.broadcast_to(jnp.asarray(row), (batch, length))
        return op(**operands, segment_ids=ids)

    return run
