"""Shapes of checkpoint attention in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.checkpoint_attention.api import checkpoint_attention
from pallas_kernels.tools import programs
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape:
    """One use of the op.

    Attributes:
      name: what tests and commands call it.
      source: the model and where its numbers are published.
      batch, length, groups, heads, key_size, value_size: B, L, G, H, K, V.
      interval: tokens from one checkpoint to the next.
      dtype: of all arrays of floats.
      segmented: rows hold several documents.
      past: checkpoints of earlier calls.
    """

    name: str
    source: str
    batch: int
    length: int
    groups: int
    heads: int
    key_size: int
    value_size: int
    interval: int
    dtype: str = "bfloat16"
    segmented: bool = False
    past: int = 0

    def scaled(self, factor: float) -> Shape:
        """The same with another length."""
        length = max(1, round(self.length * factor))
        return dataclasses.replace(self, name=f"{self.name} x{factor:g}", length=length)

    def operands(self) -> tuple[Struct, ...]:
        """`q, k, v`, then `past_k, past_v, past_length, offset` and `segment_ids` if there are."""
        rows = (self.batch, self.length)

        def floats(length: int, heads: int, width: int) -> Struct:
            return Struct((self.batch, length, heads, width), self.dtype)

        q = floats(self.length, self.heads, self.key_size)
        widths = self.key_size, self.value_size
        operands = [q, *(floats(self.length, self.groups, width) for width in widths)]
        if self.past:
            operands += [floats(self.past, self.groups, width) for width in widths]
            operands += [Struct((self.batch,), jnp.int32)] * 2
        if self.segmented:
            operands.append(Struct(rows, jnp.int32))
        return tuple(operands)


_RAT = "RAT, Wei et al. 2025, arXiv:2507.04416: 16 heads, chunks of 16"
_SCOUT = "SCOUT, Jafari et al. 2025, arXiv:2509.00935: checkpoints every 10 tokens"
_BENCH = "the shape that speed is held to"
_ODD = "no model: lengths and widths that divide nothing"

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("bench", _BENCH, 1, 8192, 16, 16, 128, 128, 16),
        Shape("bench-packed", _BENCH, 1, 8192, 16, 16, 128, 128, 16, "bfloat16", True),
        Shape("rat-1.3b", _RAT, 1, 4096, 16, 16, 128, 128, 16),
        Shape("rat-1.3b-prefill", _RAT, 1, 1024, 16, 16, 128, 128, 16, "bfloat16", False, 192),
        Shape("scout-430m", f"{_SCOUT}: 16 heads", 1, 4096, 16, 16, 64, 64, 10),
        Shape("scout-1.6b", f"{_SCOUT}: 32 heads", 1, 2048, 32, 32, 64, 64, 10),
        Shape("long", "a row of 64k tokens, grouped heads", 1, 65536, 2, 8, 128, 128, 16),
        Shape("cpu", "a laptop", 1, 16384, 1, 1, 64, 64, 16, "float32"),
        Shape("odd", _ODD, 2, 1000, 2, 6, 24, 40, 7, "float32"),
        Shape("odd-packed", _ODD, 2, 1000, 2, 6, 24, 40, 7, "float32", True, 9),
    )
}


def named(name: str) -> Shape:
    """The entry of `SHAPES`; ValueError if there is none."""
    return programs.named(SHAPES, name)


def program(op: Callable[..., Any], shape: Shape, mode: str) -> programs.Program:
    """An op with `checkpoint_attention`'s signature as a program; see `programs.program`."""

    def forward(q, k, v, *more):
        rest, options = iter(more), {}
        if shape.past:
            for name in ("past_k", "past_v", "past_length", "offset"):
                options[name] = next(rest)
        if shape.segmented:
            options["segment_ids"] = next(rest)
        return (op(q, k, v, interval=shape.interval, **options),)

    return programs.program(forward, shape.operands(), mode)


def case(
    shape: str | Shape, implementation: str = "tpu", mode: str = "forward", scale: str = "1"
) -> tuple[Any, ...]:
    """`(fn, *operands)` of the op's `program`, for `tools.aot`.

    Args:
      shape: a name in `SHAPES`, or a shape of your own.
      implementation: as in `checkpoint_attention`.
      mode: "forward" or "forward+backward".
      scale: factor on the length, as a string so that the command line can give it.

    Raises:
      ValueError: unknown shape or mode, or what `checkpoint_attention` refuses.
    """
    chosen = programs.chosen(SHAPES, shape, scale)
    op = functools.partial(checkpoint_attention, implementation=implementation)
    fn, operands = program(op, chosen, mode)
    return fn, *operands
