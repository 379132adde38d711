"""Shapes of linear attention in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.linear_attention.api import OP, linear_attention
from pallas_kernels.tools import programs
from pallas_kernels.tools.family import Family
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape(programs.Shape):
    """One use of the op.

    Attributes:
      batch, length, groups, heads, key_size, value_size: B, L, G, H, K, V.
      decay: None, "constant" `(H,)`, "head" `(B, L, H)` or "key" `(B, L, H, K)`.
      dtype: of q, k and v.
      decay_dtype: of the log decays.
      segmented: rows hold several documents.
      state: a state is carried in.
    """

    groups: int
    heads: int
    key_size: int
    value_size: int
    decay: Literal["constant", "head", "key"] | None = None
    dtype: str = "bfloat16"
    decay_dtype: str = "float32"
    segmented: bool = False
    state: bool = False

    def operands(self) -> dict[str, Struct]:
        """`q, k, v`, then `log_decay`, `initial_state` and `segment_ids` as far as there are."""
        rows, heads = (self.batch, self.length), (self.heads,)
        q = Struct((*rows, self.groups, self.key_size), self.dtype)
        operands = {"q": q, "k": q, "v": Struct((*rows, *heads, self.value_size), self.dtype)}
        decays = {"constant": heads, "head": rows + heads, "key": (*rows, *heads, self.key_size)}
        if self.decay is not None:
            operands["log_decay"] = Struct(decays[self.decay], self.decay_dtype)
        if self.state:
            state = (self.batch, *heads, self.key_size, self.value_size)
            operands["initial_state"] = Struct(state, "float32")
        if self.segmented:
            operands["segment_ids"] = Struct(rows, jnp.int32)
        return operands


_SSD = "Mamba-2, Dao & Gu 2024, arXiv:2405.21060"
_GLA = "GLA, Yang et al. 2024, arXiv:2312.06635: 1.3B, 4 heads, keys 256 and values 512 wide"
_RETNET = "RetNet, Sun et al. 2023, arXiv:2307.08621: keys 256 wide"
_LIGHTNING = "Lightning Attention-2, Qin et al. 2024, arXiv:2401.04658"
_BENCH = "the shape that speed is held to"
_ODD = "no model: lengths and widths that divide nothing"

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("head-bench", _BENCH, 1, 8192, 1, 16, 128, 128, "head"),
        Shape("head-bench-packed", _BENCH, 1, 8192, 1, 16, 128, 128, "head", "bfloat16",
              "float32", True, True),
        Shape("key-bench", _BENCH, 1, 8192, 16, 16, 128, 128, "key"),
        Shape("key-bench-packed", _BENCH, 1, 8192, 16, 16, 128, 128, "key", "bfloat16",
              "float32", True, True),
        Shape("mamba2-130m", f"{_SSD}: 24 heads", 1, 2048, 1, 24, 128, 64, "head"),
        Shape("mamba2-2.7b", f"{_SSD}: 80 heads", 1, 2048, 1, 80, 128, 64, "head"),
        # Values of 512 a head run as two heads of 256 with the same keys.
        Shape("gla-1.3b", _GLA, 1, 2048, 8, 8, 256, 256, "key"),
        Shape("retnet-1.3b", _RETNET, 1, 2048, 8, 8, 256, 256, "constant"),
        Shape("lightning-tnl-1b", _LIGHTNING, 1, 4096, 16, 16, 128, 128, "constant"),
        Shape("plain", _ODD, 2, 1024, 4, 4, 64, 64),
        Shape("cpu", "a laptop", 1, 4096, 4, 4, 64, 64, "head", "float32"),
        Shape("odd-head", _ODD, 2, 1000, 2, 6, 24, 40, "head", "float32"),
        Shape("odd-key-packed", _ODD, 2, 1000, 3, 6, 24, 40, "key", "float32", "float32", True),
        Shape("odd-constant", _ODD, 2, 65, 1, 3, 16, 16, "constant", "float32"),
    )
}  # fmt: skip

FAMILY = Family(
    linear_attention,
    OP,
    SHAPES,
    # A decay for each head, for each key, a constant one, none.
    representatives=("head-bench-packed", "key-bench-packed", "retnet-1.3b", "plain"),
    slow_to_estimate=True,
)
case, named = FAMILY.case, FAMILY.named
