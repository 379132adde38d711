"""Shapes of the short convolution in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.causal_conv1d.api import OP, causal_conv1d
from pallas_kernels.causal_conv1d.tile import Activation
from pallas_kernels.tools import programs
from pallas_kernels.tools.family import Family
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape(programs.Shape):
    """One use of the convolution.

    Attributes:
      batch, length, width: B, L, D of `x (B, L, D)`.
      conv_size: W.
      dtype: "float32" or "bfloat16", of `x`; the weights are float32.
      activation: None or "silu".
      bias: there is one.
      segmented: rows hold several documents.
    """

    width: int
    conv_size: int = 4
    dtype: str = "bfloat16"
    activation: Activation = "silu"
    bias: bool = True
    segmented: bool = False

    def operands(self) -> dict[str, Struct]:
        """`x (B, L, D)`, `weight (W, D)`, `initial_state (B, W-1, D)`, then `bias (D,)` if there
        is one and `segment_ids (B, L)` int32 if segmented."""
        operands = {
            "x": Struct((self.batch, self.length, self.width), self.dtype),
            "weight": Struct((self.conv_size, self.width), jnp.float32),
            "initial_state": Struct((self.batch, self.conv_size - 1, self.width), self.dtype),
        }
        if self.bias:
            operands["bias"] = Struct((self.width,), jnp.float32)
        if self.segmented:
            operands["segment_ids"] = Struct((self.batch, self.length), jnp.int32)
        return operands

    def options(self) -> dict[str, Any]:
        """`activation`."""
        return {"activation": self.activation}


_MAMBA = "Mamba, Gu and Dao 2023, arXiv:2312.00752"
_MAMBA2 = "Mamba-2, Dao and Gu 2024, arXiv:2405.21060: d_inner + 2 x 128 channels"
_GEMMA = "RecurrentGemma-2B, Botev et al. 2024, arXiv:2404.07839: lru_width 2560, 8192 tokens"
_DELTA = "Gated DeltaNet 1.3B, Yang et al. 2024, arXiv:2412.06464: values of 2 x 1536"
_HYENA = "Hyena 153M, Poli et al. 2023, arXiv:2302.10866: 3 x 864 channels"
_ODD = "no model: lengths and widths that divide nothing"

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("mamba-130m", f"{_MAMBA}: d_inner 1536", 8, 2048, 1536),
        Shape("mamba-370m-f32", f"{_MAMBA}: d_inner 2048", 1, 4096, 2048, dtype="float32"),
        Shape("mamba-790m", f"{_MAMBA}: d_inner 3072", 4, 2048, 3072),
        Shape("mamba-2.8b", f"{_MAMBA}: d_inner 5120", 2, 2048, 5120),
        Shape("mamba-2.8b-packed", f"{_MAMBA}: d_inner 5120", 1, 4096, 5120, segmented=True),
        Shape("mamba2-2.7b", _MAMBA2, 2, 2048, 5376),
        Shape("recurrentgemma-2b", _GEMMA, 1, 8192, 2560, activation=None),
        Shape("recurrentgemma-2b-f32", _GEMMA, 1, 8192, 2560, dtype="float32", activation=None),
        Shape("recurrentgemma-2b-packed", _GEMMA, 1, 8192, 2560, activation=None, segmented=True),
        Shape("gated-deltanet-1.3b", _DELTA, 2, 4096, 3072, bias=False),
        Shape("hyena-153m", _HYENA, 4, 2048, 2592, conv_size=3, activation=None),
        Shape("odd", _ODD, 2, 1000, 60, dtype="float32"),
        Shape("odd-packed", _ODD, 3, 333, 200, conv_size=7, segmented=True),
        Shape("odd-wide-window", _ODD, 2, 100, 130, conv_size=12, dtype="float32", segmented=True),
        Shape("short", _ODD, 3, 5, 70, conv_size=8),
        Shape("one-tap", _ODD, 2, 50, 128, conv_size=1, dtype="float32"),
    )
}

FAMILY = Family(
    causal_conv1d,
    OP,
    SHAPES,
    # With activation and documents, and without.
    representatives=("mamba-2.8b-packed", "recurrentgemma-2b"),
)
case, named = FAMILY.case, FAMILY.named
