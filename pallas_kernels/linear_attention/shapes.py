"""Shapes of linear attention in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels.linear_attention.api import linear_attention
from pallas_kernels.tools import programs
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape:
    """One use of the op.

    Attributes:
      name: what tests and commands call it.
      source: the model and where its numbers are published.
      batch, length, groups, heads, key_size, value_size: B, L, G, H, K, V.
      decay: None, "constant" `(H,)`, "head" `(B, L, H)` or "key" `(B, L, H, K)`.
      dtype: of q, k and v.
      decay_dtype: of the log decays.
      segmented: rows hold several documents.
      state: a state is carried in.
    """

    name: str
    source: str
    batch: int
    length: int
    groups: int
    heads: int
    key_size: int
    value_size: int
    decay: Literal["constant", "head", "key"] | None = None
    dtype: str = "bfloat16"
    decay_dtype: str = "float32"
    segmented: bool = False
    state: bool = False

    def scaled(self, factor: float) -> Shape:
        """The same with another length."""
        length = max(1, round(self.length * factor))
        return dataclasses.replace(self, name=f"{self.name} x{factor:g}", length=length)

    def operands(self) -> tuple[Struct, ...]:
        """`q, k, v`, then `log_decay`, `initial_state` and `segment_ids` as far as there are."""
        rows, heads = (self.batch, self.length), (self.heads,)
        q = Struct((*rows, self.groups, self.key_size), self.dtype)
        v = Struct((*rows, *heads, self.value_size), self.dtype)
        decays = {"constant": heads, "head": rows + heads, "key": (*rows, *heads, self.key_size)}
        more = []
        if self.decay is not None:
            more.append(Struct(decays[self.decay], self.decay_dtype))
        if self.state:
            more.append(Struct((self.batch, *heads, self.key_size, self.value_size), "float32"))
        if self.segmented:
            more.append(Struct(rows, jnp.int32))
        return (q, q, v, *more)


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


def named(name: str) -> Shape:
    """The entry of `SHAPES`; ValueError if there is none."""
    return programs.named(SHAPES, name)


def program(op: Callable[..., Any], shape: Shape, mode: str) -> programs.Program:
    """An op with `linear_attention`'s signature as a program; see `programs.program`."""

    def forward(q, k, v, *more):
        rest = iter(more)
        log_decay = next(rest) if shape.decay else None
        initial_state = next(rest) if shape.state else None
        segment_ids = next(rest) if shape.segmented else None
        return op(q, k, v, log_decay, initial_state=initial_state, segment_ids=segment_ids)

    return programs.program(forward, shape.operands(), mode)


def case(
    shape: str | Shape, implementation: str = "tpu", mode: str = "forward", scale: str = "1"
) -> tuple[Any, ...]:
    """`(fn, *operands)` of the op's `program`, for `tools.aot`.

    Args:
      shape: a name in `SHAPES`, or a shape of your own.
      implementation: as in `linear_attention`.
      mode: "forward" or "forward+backward".
      scale: factor on the length, as a string so that the command line can give it.

    Raises:
      ValueError: unknown shape or mode, or what `linear_attention` refuses.
    """
    chosen = programs.chosen(SHAPES, shape, scale)
    op = functools.partial(linear_attention, implementation=implementation)
    fn, operands = program(op, chosen, mode)
    return fn, *operands
