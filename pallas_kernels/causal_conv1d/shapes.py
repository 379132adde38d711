"""Shapes of the short convolution in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d.api import causal_conv1d
from pallas_kernels.causal_conv1d.tile import Activation
from pallas_kernels.tools import programs


@dataclasses.dataclass(frozen=True)
class Shape:
    """One use of the convolution.

    Attributes:
      name: what tests and commands call it.
      source: the model and where its numbers are published.
      batch, length, width: B, L, D of `x (B, L, D)`.
      taps: W.
      dtype: "float32" or "bfloat16", of `x`; the weights are float32.
      activation: None or "silu".
      bias: there is one.
      segmented: rows hold several documents.
    """

    name: str
    source: str
    batch: int
    length: int
    width: int
    taps: int = 4
    dtype: str = "bfloat16"
    activation: Activation = "silu"
    bias: bool = True
    segmented: bool = False

    def scaled(self, factor: float) -> Shape:
        """The same with another length."""
        length = max(1, round(self.length * factor))
        return dataclasses.replace(self, name=f"{self.name} x{factor:g}", length=length)

    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """`x (B, L, D)`, `weight (W, D)`, `initial_state (B, W-1, D)`, then `bias (D,)` if there
        is one and `segment_ids (B, L)` int32 if segmented."""
        structs = [
            jax.ShapeDtypeStruct((self.batch, self.length, self.width), self.dtype),
            jax.ShapeDtypeStruct((self.taps, self.width), jnp.float32),
            jax.ShapeDtypeStruct((self.batch, self.taps - 1, self.width), self.dtype),
        ]
        if self.bias:
            structs.append(jax.ShapeDtypeStruct((self.width,), jnp.float32))
        if self.segmented:
            structs.append(jax.ShapeDtypeStruct((self.batch, self.length), jnp.int32))
        return tuple(structs)


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
        Shape("hyena-153m", _HYENA, 4, 2048, 2592, taps=3, activation=None),
        Shape("odd", _ODD, 2, 1000, 60, dtype="float32"),
        Shape("odd-packed", _ODD, 3, 333, 200, taps=7, segmented=True),
        Shape("odd-wide-window", _ODD, 2, 100, 130, taps=12, dtype="float32", segmented=True),
        Shape("short", _ODD, 3, 5, 70, taps=8),
        Shape("one-tap", _ODD, 2, 50, 128, taps=1, dtype="float32"),
    )
}


def named(name: str) -> Shape:
    """The entry of `SHAPES`; ValueError if there is none."""
    return programs.named(SHAPES, name)


def program(conv: Callable[..., Any], shape: Shape, mode: str) -> programs.Program:
    """A convolution with `causal_conv1d`'s signature as a program of `shape.operands()`; see
    `programs.program`."""

    def forward(x, weight, initial_state, *rest):
        options = iter(rest)
        bias = next(options) if shape.bias else None
        segment_ids = next(options) if shape.segmented else None
        return conv(
            x,
            weight,
            bias,
            activation=shape.activation,
            initial_state=initial_state,
            segment_ids=segment_ids,
        )

    return programs.program(forward, shape.operands(), mode)


def case(
    shape: str | Shape, implementation: str = "tpu", mode: str = "forward", scale: str = "1"
) -> tuple[Any, ...]:
    """`(fn, *operands)` of the op's `program`, for `tools.aot`.

    Args:
      shape: a name in `SHAPES`, or a shape of your own.
      implementation: as in `causal_conv1d`.
      mode: "forward" or "forward+backward".
      scale: factor on the length, as a string so that the command line can give it.

    Raises:
      ValueError: unknown shape or mode, or what `causal_conv1d` refuses.
    """
    chosen = programs.chosen(SHAPES, shape, scale)
    conv = functools.partial(causal_conv1d, implementation=implementation)
    fn, operands = program(conv, chosen, mode)
    return fn, *operands
