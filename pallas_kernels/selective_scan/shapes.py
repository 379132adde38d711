"""Shapes of the selective scan in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.selective_scan.api import OP, selective_scan
from pallas_kernels.tools import programs
from pallas_kernels.tools.family import Family
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape(programs.Shape):
    """One use of the scan.

    Attributes:
      batch, length, width, states: B, L, D, N.
      dtype: "float32" or "bfloat16", of x, dt, B, C and the gate; A, D and dt_bias are float32.
      gated: a gate, a bias of dt and its softplus, as Mamba's block has them.
      segmented: rows hold several documents.
      reverse: from the last token to the first.
    """

    width: int
    states: int = 16
    dtype: str = "float32"
    gated: bool = True
    segmented: bool = False
    reverse: bool = False

    def operands(self) -> dict[str, Struct]:
        """Arguments of `selective_scan` by name, in its order."""
        channels = Struct((self.batch, self.length, self.width), self.dtype)
        shared = Struct((self.batch, self.length, self.states), self.dtype)
        channel = Struct((self.width,), jnp.float32)
        operands = {
            "x": channels,
            "dt": channels,
            "A": Struct((self.width, self.states), jnp.float32),
            "B": shared,
            "C": shared,
            "D": channel,
        }
        if self.gated:
            operands |= {"gate": channels, "dt_bias": channel}
        operands["initial_state"] = Struct((self.batch, self.width, self.states), jnp.float32)
        if self.segmented:
            operands["segment_ids"] = Struct((self.batch, self.length), jnp.int32)
        return operands

    def options(self) -> dict[str, Any]:
        """`dt_softplus` and `reverse`."""
        return {"dt_softplus": self.gated, "reverse": self.reverse}


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

FAMILY = Family(
    selective_scan,
    OP,
    SHAPES,
    # With gate, bias, softplus and documents, and without.
    representatives=("mamba-790m-packed", "bench"),
    slow_to_estimate=True,
)
case, named = FAMILY.case, FAMILY.named
