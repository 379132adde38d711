"""Shapes of the selective scan in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.tools import programs


@dataclasses.dataclass(frozen=True)
class Shape:
    """One use of the scan.

    Attributes:
      name: what tests and commands call it.
      source: the model and where its numbers are published.
      batch, length, width, states: B, L, D, N.
      dtype: "float32" or "bfloat16", of x, dt, B, C and the gate; A, D and dt_bias are float32.
      gated: a gate, a bias of dt and its softplus, as Mamba's block has them.
      segmented: rows hold several documents.
      reverse: from the last token to the first.
    """

    name: str
    source: str
    batch: int
    length: int
    width: int
    states: int = 16
    dtype: str = "float32"
    gated: bool = True
    segmented: bool = False
    reverse: bool = False

    def scaled(self, factor: float) -> Shape:
        """The same with another length."""
        length = max(1, round(self.length * factor))
        return dataclasses.replace(self, name=f"{self.name} x{factor:g}", length=length)

    def operands(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments of `selective_scan` by name, in its order."""
        struct = jax.ShapeDtypeStruct
        channels = struct((self.batch, self.length, self.width), self.dtype)
        shared = struct((self.batch, self.length, self.states), self.dtype)
        channel = struct((self.width,), jnp.float32)
        operands = {
            "x": channels,
            "dt": channels,
            "A": struct((self.width, self.states), jnp.float32),
            "B": shared,
            "C": shared,
            "D": channel,
        }
        if self.gated:
            operands |= {"gate": channels, "dt_bias": channel}
        operands["initial_state"] = struct((self.batch, self.width, self.states), jnp.float32)
        if self.segmented:
            operands["segment_ids"] = struct((self.batch, self.length), jnp.int32)
        return operands


_MAMBA = "Mamba, Gu and Dao 2023, arXiv:2312.00752: 2048 tokens, inner width 2 x"
_ODD = "no model: lengths and widths that divide nothing"

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("mamba-130m", f"{_MAMBA} 768", 1, 2048, 1536, dtype="bfloat16"),
        Shape("mamba-790m", f"{_MAMBA} 1536", 1, 2048, 3072, dtype="bfloat16"),
        Shape("mamba-2.8b", f"{_MAMBA} 2560", 1, 2048, 5120, dtype="bfloat16"),
        Shape("mamba-790m-f32", f"{_MAMBA} 1536", 1, 2048, 3072),
        Shape("mamba-790m-packed", f"{_MAMBA} 1536", 1, 2048, 3072, segmented=True),
        Shape("mamba-130m-reverse", f"{_MAMBA} 768, backwards", 1, 2048, 1536, reverse=True),
        Shape("bench", "no model: the scan alone", 1, 4096, 2048, gated=False),
        Shape("cpu", "no model: a laptop's size", 2, 2048, 512, gated=False),
        Shape("odd", _ODD, 2, 1000, 60, 5),
        Shape("odd-packed-reverse", _ODD, 2, 1000, 60, 5, segmented=True, reverse=True),
        Shape("short", _ODD, 3, 15, 200, gated=False),
    )
}


def program(scan: Callable[..., Any], shape: Shape, mode: str) -> programs.Program:
    """`programs.program` of a scan with `selective_scan`'s signature, on `shape.operands()`.

    Raises:
      ValueError: unknown mode.
    """
    operands = shape.operands()

    def forward(*args):
        named = dict(zip(operands, args, strict=True))
        return scan(**named, dt_softplus=shape.gated, reverse=shape.reverse)

    return programs.program(forward, tuple(operands.values()), mode)


def case(
    shape: str | Shape, implementation: str = "tpu", mode: str = "forward", scale: str = "1"
) -> tuple[Any, ...]:
    """`(fn, *operands)` of the op's `program`, for `tools.aot`.

    Args:
      shape: a name in `SHAPES`, or a shape of your own.
      implementation: as in `selective_scan`.
      mode: "forward" or "forward+backward".
      scale: factor on the length, as a string so that the command line can give it.

    Raises:
      ValueError: unknown shape or mode, or what `selective_scan` refuses.
    """
    chosen = programs.chosen(SHAPES, shape, scale)
    scan = functools.partial(selective_scan, implementation=implementation)
    fn, operands = program(scan, chosen, mode)
    return fn, *operands
