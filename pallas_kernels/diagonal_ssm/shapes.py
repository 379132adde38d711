"""Shapes of diagonal state-space models as published: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.diagonal_ssm.api import diagonal_ssm
from pallas_kernels.tools import programs


@dataclasses.dataclass(frozen=True)
class Shape:
    """One use of the model.

    Attributes:
      name: what tests and commands call it.
      source: the model and where its numbers are published.
      batch, length, width: B, L, H of `u (B, L, H)`.
      states: N, half the real state size.
      dtype: "float32" or "bfloat16", of the input.
      segmented: rows hold several documents.
      reverse: from the last token to the first.
    """

    name: str
    source: str
    batch: int
    length: int
    width: int
    states: int
    dtype: str = "float32"
    segmented: bool = False
    reverse: bool = False

    def scaled(self, factor: float) -> Shape:
        """The same with another length."""
        length = max(1, round(self.length * factor))
        return dataclasses.replace(self, name=f"{self.name} x{factor:g}", length=length)

    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """`u (B, L, H)`, `log_a` and `c (H, N)`, `initial_state (B, H, N)` and, if segmented,
        `segment_ids (B, L)` int32."""
        rows = (self.batch, self.length)
        u = jax.ShapeDtypeStruct((*rows, self.width), self.dtype)
        parameter = jax.ShapeDtypeStruct((self.width, self.states), jnp.complex64)
        state = jax.ShapeDtypeStruct((self.batch, *parameter.shape), jnp.complex64)
        segment_ids = jax.ShapeDtypeStruct(rows, jnp.int32)
        operands = (u, parameter, parameter, state)
        return (*operands, segment_ids) if self.segmented else operands


_S4D = "S4D, Gu et al. 2022, arXiv:2206.11893: 64 real states"
_S4 = "state-spaces/s4 at its head: 4 real states"
_DSS = "DSS, Gupta et al. 2022, arXiv:2203.14343: 64 complex states"
_ODD = "no model: lengths and widths that divide nothing"

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("s4d-listops", f"{_S4D}, ListOps", 50, 2048, 128, 32),
        Shape("s4-listops", f"{_S4}, ListOps", 32, 2048, 256, 2),
        Shape("s4d-text", f"{_S4D}, Text", 16, 4096, 256, 32),
        Shape("s4d-text-packed", f"{_S4D}, Text", 8, 8192, 256, 32, segmented=True),
        Shape("s4d-text-bf16", f"{_S4D}, Text", 16, 4096, 256, 32, "bfloat16"),
        Shape("s4d-image", f"{_S4D}, Image", 50, 1024, 512, 32),
        Shape("s4d-pathfinder", f"{_S4D}, Pathfinder", 64, 1024, 256, 32),
        Shape("s4d-pathx", f"{_S4D}, Path-X", 16, 16384, 256, 32),
        Shape("dss-listops", f"{_DSS}, ListOps", 50, 2048, 128, 64),
        Shape("odd-packed-reverse", _ODD, 2, 1000, 60, 5, segmented=True, reverse=True),
        Shape("short", _ODD, 3, 15, 200, 32),
    )
}


def named(name: str) -> Shape:
    """The entry of `SHAPES`; ValueError if there is none."""
    return programs.named(SHAPES, name)


def program(op: Callable[..., Any], shape: Shape, mode: str) -> programs.Program:
    """An op with `diagonal_ssm`'s signature as a program of
    `(u, log_a, c, initial_state[, segment_ids])`; see `programs.program`."""

    def forward(u, log_a, c, initial_state, segment_ids=None):
        return op(
            u,
            log_a,
            c,
            initial_state=initial_state,
            segment_ids=segment_ids,
            reverse=shape.reverse,
        )

    return programs.program(forward, shape.operands(), mode)


def case(
    shape: str | Shape, implementation: str = "tpu", mode: str = "forward", scale: str = "1"
) -> tuple[Any, ...]:
    """`(fn, *operands)` of the op's `program`, complex arrays as pairs, for `tools.aot`.

    Args:
      shape: a name in `SHAPES`, or a shape of your own.
      implementation: as in `diagonal_ssm`.
      mode: "forward" or "forward+backward".
      scale: factor on the length, as a string so that the command line can give it.

    Raises:
      ValueError: unknown shape or mode, or what `diagonal_ssm` refuses.
    """
    chosen = programs.chosen(SHAPES, shape, scale)
    op = functools.partial(diagonal_ssm, implementation=implementation)
    return programs.as_pairs(*program(op, chosen, mode))
