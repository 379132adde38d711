"""Shapes of diagonal state-space models as published: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.diagonal_ssm.api import OP, diagonal_ssm
from pallas_kernels.tools import programs
from pallas_kernels.tools.family import Family
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape(programs.Shape):
    """One use of the model.

    Attributes:
      batch, length, width: B, L, H of `u (B, L, H)`.
      states: N, half the real state size.
      dtype: "float32" or "bfloat16", of the input.
      segmented: rows hold several documents.
      reverse: from the last token to the first.
    """

    width: int
    states: int
    dtype: str = "float32"
    segmented: bool = False
    reverse: bool = False

    def operands(self) -> dict[str, Struct]:
        """`u (B, L, H)`, `log_a` and `c (H, N)`, `initial_state (B, H, N)` and, if segmented,
        `segment_ids (B, L)` int32."""
        rows = (self.batch, self.length)
        parameter = Struct((self.width, self.states), jnp.complex64)
        operands = {
            "u": Struct((*rows, self.width), self.dtype),
            "log_a": parameter,
            "c": parameter,
            "initial_state": Struct((self.batch, *parameter.shape), jnp.complex64),
        }
        if self.segmented:
            operands["segment_ids"] = Struct(rows, jnp.int32)
        return operands

    def options(self) -> dict[str, Any]:
        """`reverse`."""
        return {"reverse": self.reverse}


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

FAMILY = Family(
    diagonal_ssm,
    OP,
    SHAPES,
    representatives=("s4d-text-packed", "short"),
    slow_to_estimate=True,
)
case, named = FAMILY.case, FAMILY.named
