"""Shapes of the delta rule in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.delta_rule.api import OP, delta_rule
from pallas_kernels.tools import programs
from pallas_kernels.tools.family import Family
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape(programs.Shape):
    """One use of the op.

    Attributes:
      batch, length, groups, heads, key_size, value_size: B, L, G, H, K, V.
      decay: None, "head" `(B, L, H)` or "key" `(B, L, H, K)`.
      dtype: of q, k, v and beta.
      decay_dtype: of the log decays.
      segmented: rows hold several documents.
      state: a state is carried in.
    """

    groups: int
    heads: int
    key_size: int
    value_size: int
    decay: Literal["head", "key"] | None = None
    dtype: str = "bfloat16"
    decay_dtype: str = "float32"
    segmented: bool = False
    state: bool = False

    def operands(self) -> dict[str, Struct]:
        """Arguments of `delta_rule` by name, in its order."""
        tokens = (self.batch, self.length)
        heads = (*tokens, self.heads)
        q = Struct((*tokens, self.groups, self.key_size), self.dtype)
        operands = {
            "q": q,
            "k": q,
            "v": Struct((*heads, self.value_size), self.dtype),
            "beta": Struct(heads, self.dtype),
        }
        if self.decay is not None:
            keys = (self.key_size,) if self.decay == "key" else ()
            operands["log_decay"] = Struct((*heads, *keys), self.decay_dtype)
        if self.state:
            state = (self.batch, self.heads, self.key_size, self.value_size)
            operands["initial_state"] = Struct(state, "float32")
        if self.segmented:
            operands["segment_ids"] = Struct(tokens, jnp.int32)
        return operands


_DELTANET = "DeltaNet, Yang et al. 2024, arXiv:2406.06484: 1.3B, 16 heads of 128"
_GATED = "Gated DeltaNet, Yang et al. 2024, arXiv:2412.06464: 1.3B, 6 heads, values 512 wide"
_QWEN = "Qwen3-Next-80B-A3B: 16 heads of keys and 32 of values, 128 wide"
_KIMI = "Kimi Linear 48B-A3B, Kimi Team 2025, arXiv:2510.26692: 32 heads of 128"
_BENCH = "the shape that speed is held to"
_ODD = "no model: lengths and widths that divide nothing"

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("gated-delta-bench", _BENCH, 1, 8192, 16, 16, 128, 128, "head"),
        Shape("gated-delta-bench-packed", _BENCH, 1, 8192, 16, 16, 128, 128, "head",
              segmented=True, state=True),
        Shape("kda-bench", _BENCH, 1, 8192, 16, 16, 128, 128, "key"),
        Shape("kda-bench-packed", _BENCH, 1, 8192, 16, 16, 128, 128, "key",
              segmented=True, state=True),
        Shape("deltanet-1.3b", _DELTANET, 1, 2048, 16, 16, 128, 128),
        # Values of 512 a head run as two heads of 256 with the same keys, beta and decays.
        Shape("gated-deltanet-1.3b", _GATED, 1, 4096, 6, 12, 256, 256, "head"),
        Shape("qwen3-next", _QWEN, 1, 4096, 16, 32, 128, 128, "head"),
        Shape("kimi-linear", _KIMI, 1, 4096, 32, 32, 128, 128, "key"),
        Shape("cpu", "a laptop", 1, 4096, 4, 4, 64, 64, "head", "float32"),
        Shape("odd-plain", _ODD, 2, 65, 3, 3, 16, 24, None, "float32"),
        Shape("odd-head-packed", _ODD, 2, 1000, 2, 6, 24, 40, "head", "float32",
              segmented=True, state=True),
        Shape("odd-key-packed", _ODD, 2, 1000, 3, 6, 24, 40, "key", "float32",
              segmented=True, state=True),
    )
}  # fmt: skip

FAMILY = Family(
    delta_rule,
    OP,
    SHAPES,
    # A decay for each head, for each key, none.
    representatives=("gated-delta-bench-packed", "kda-bench-packed", "odd-plain"),
    slow_to_estimate=True,
)
case, named = FAMILY.case, FAMILY.named
