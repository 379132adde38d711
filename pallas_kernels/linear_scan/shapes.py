"""Shapes of the linear scan in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.linear_scan.api import OP, linear_scan
from pallas_kernels.tools import programs
from pallas_kernels.tools.family import Family
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape(programs.Shape):
    """One use of the scan.

    Attributes:
      batch, length, width: B, L, D of `b (B, L, D)`.
      dtype: "float32", "bfloat16" or "complex64", of the input.
      constant: the decay is one `(D,)` for all steps, as in S5 and LRU.
      segmented: rows hold several documents.
      reverse: from the last token to the first.
      decay_dtype: where it is not `dtype`.
    """

    width: int
    dtype: str = "float32"
    constant: bool = False
    segmented: bool = False
    reverse: bool = False
    decay_dtype: str | None = None

    @property
    def is_complex(self) -> bool:
        return self.dtype == "complex64"

    @property
    def state_dtype(self) -> str:
        return "complex64" if self.is_complex else "float32"

    def operands(self) -> dict[str, Struct]:
        """`a (B, L, D)` or `(D,)`, `b (B, L, D)`, `initial_state (B, D)` and, if segmented,
        `segment_ids (B, L)` int32."""
        block = (self.batch, self.length, self.width)
        operands = {
            "a": Struct(block[2:] if self.constant else block, self.decay_dtype or self.dtype),
            "b": Struct(block, self.dtype),
            "initial_state": Struct((self.batch, self.width), self.state_dtype),
        }
        if self.segmented:
            operands["segment_ids"] = Struct(block[:2], jnp.int32)
        return operands

    def options(self) -> dict[str, Any]:
        """`reverse`."""
        return {"reverse": self.reverse}


_GRIFFIN = "Griffin, De et al. 2024, arXiv:2402.19427: width 4096"
_GEMMA = "RecurrentGemma-2B, Botev et al. 2024, arXiv:2404.07839: lru_width 2560, 8192 tokens"
_S5 = "S5, Smith et al. 2023, arXiv:2208.04933"
_LRU = "LRU, Orvieto et al. 2023, arXiv:2303.06349"
_ODD = "no model: lengths and widths that divide nothing"

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("recurrentgemma-2b", _GEMMA, 1, 8192, 2560),
        Shape("recurrentgemma-2b-bf16", _GEMMA, 1, 8192, 2560, "bfloat16"),
        Shape("recurrentgemma-2b-packed", _GEMMA, 1, 8192, 2560, segmented=True),
        Shape(
            "griffin-9b",
            f"{_GRIFFIN}: width 4096",
            1,
            8192,
            4096,
            "bfloat16",
            decay_dtype="float32",
        ),
        Shape("s5-listops", f"{_S5}: ListOps", 50, 2048, 8, "complex64", True),
        Shape("s5-listops-packed", f"{_S5}: ListOps", 8, 8192, 8, "complex64", True, True),
        Shape("s5-text", f"{_S5}: Text", 50, 4096, 96, "complex64", True),
        Shape("s5-text-reverse", f"{_S5}: Text", 50, 4096, 96, "complex64", True, reverse=True),
        Shape("s5-pathx", f"{_S5}: Path-X", 32, 16384, 128, "complex64", True),
        Shape("lru-scifar", f"{_LRU}: sCIFAR", 50, 1024, 384, "complex64", True),
        Shape("odd", _ODD, 2, 1000, 60),
        Shape("odd-packed-reverse", _ODD, 2, 1000, 60, "float32", False, True, True),
        Shape("odd-complex", _ODD, 2, 1000, 60, "complex64"),
        Shape("odd-constant-bf16", _ODD, 2, 1000, 60, "bfloat16", True),
        Shape("short", _ODD, 3, 15, 200),
    )
}

FAMILY = Family(
    linear_scan,
    OP,
    SHAPES,
    # A decay for each step and a constant one, real and complex.
    representatives=("recurrentgemma-2b-packed", "s5-listops"),
)
case, named = FAMILY.case, FAMILY.named
