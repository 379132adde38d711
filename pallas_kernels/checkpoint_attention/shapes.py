"""Shapes of checkpoint attention in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.checkpoint_attention.api import OP, checkpoint_attention
from pallas_kernels.tools import programs
from pallas_kernels.tools.family import Family
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape(programs.Shape):
    """One use of the op.

    Attributes:
      batch, length, groups, heads, key_size, value_size: B, L, G, H, K, V.
      interval: tokens from one checkpoint to the next.
      dtype: of all arrays of floats.
      segmented: rows hold several documents.
      past: checkpoints of earlier calls.
    """

    groups: int
    heads: int
    key_size: int
    value_size: int
    interval: int
    dtype: str = "bfloat16"
    segmented: bool = False
    past: int = 0

    def operands(self) -> dict[str, Struct]:
        """`q, k, v`, then `past_k, past_v, past_length, offset` and `segment_ids` if there are."""

        def floats(length: int, heads: int, width: int) -> Struct:
            return Struct((self.batch, length, heads, width), self.dtype)

        operands = {
            "q": floats(self.length, self.heads, self.key_size),
            "k": floats(self.length, self.groups, self.key_size),
            "v": floats(self.length, self.groups, self.value_size),
        }
        if self.past:
            count = Struct((self.batch,), jnp.int32)
            operands |= {
                "past_k": floats(self.past, self.groups, self.key_size),
                "past_v": floats(self.past, self.groups, self.value_size),
                "past_length": count,
                "offset": count,
            }
        if self.segmented:
            operands["segment_ids"] = Struct((self.batch, self.length), jnp.int32)
        return operands

    def options(self) -> dict[str, Any]:
        """`interval`."""
        return {"interval": self.interval}


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

FAMILY = Family(
    checkpoint_attention,
    OP,
    SHAPES,
    # With documents, and with checkpoints of earlier calls.
    representatives=("bench-packed", "rat-1.3b-prefill"),
    slow_to_estimate=True,
)
case, named = FAMILY.case, FAMILY.named
