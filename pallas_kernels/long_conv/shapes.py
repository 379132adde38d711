"""Shapes of long convolutions in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.long_conv.api import long_conv
from pallas_kernels.tools import programs


@dataclasses.dataclass(frozen=True)
class Shape:
    """One use of the convolution.

    Attributes:
      name: what tests and commands call it.
      source: the model and where its numbers are published.
      batch, length, width: B, L, H of `u (B, L, H)`.
      taps: Lk, also Lr; None is L.
      two_sided: there is a `kernel_reverse`.
      dtype: "float32" or "bfloat16", of `u`; filters are float32.
    """

    name: str
    source: str
    batch: int
    length: int
    width: int
    taps: int | None = None
    two_sided: bool = False
    dtype: str = "float32"

    def scaled(self, factor: float) -> Shape:
        """The same with another length."""
        length = max(1, round(self.length * factor))
        return dataclasses.replace(self, name=f"{self.name} x{factor:g}", length=length)

    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """`u (B, L, H)`, `kernel (H, Lk)` and, if two-sided, `kernel_reverse (H, Lk)`."""
        u = jax.ShapeDtypeStruct((self.batch, self.length, self.width), self.dtype)
        kernel = jax.ShapeDtypeStruct((self.width, self.taps or self.length), jnp.float32)
        return (u, kernel, kernel) if self.two_sided else (u, kernel)


_S4 = "S4, Gu et al. 2022, arXiv:2111.00396, state-spaces/s4 at its head"
_SGCONV = "SGConv, Li et al. 2023, arXiv:2210.09298"
_HYENA = "Hyena 153M, Poli et al. 2023, arXiv:2302.10866: 864 channels"
_ODD = "no model: lengths and widths that divide nothing"

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("s4-listops", f"{_S4}, ListOps", 32, 2048, 256, two_sided=True),
        Shape("s4-text", f"{_S4}, Text", 16, 4096, 256, two_sided=True),
        Shape("s4-image", f"{_S4}, Image", 50, 1024, 512, two_sided=True),
        Shape("s4-pathx", f"{_S4}, Path-X", 16, 16384, 256, two_sided=True),
        Shape("sgconv-text", f"{_SGCONV}, Text", 16, 4096, 256),
        Shape("hyena-153m", _HYENA, 4, 2048, 864, dtype="bfloat16"),
        Shape("hyena-64k", _HYENA, 1, 65536, 864, dtype="bfloat16"),
        Shape("odd", _ODD, 3, 1000, 60, taps=333, two_sided=True),
        Shape("short", _ODD, 2, 15, 130, taps=40),
    )
}


def named(name: str) -> Shape:
    """The entry of `SHAPES`; ValueError if there is none."""
    return programs.named(SHAPES, name)


def program(conv: Callable[..., Any], shape: Shape, mode: str) -> programs.Program:
    """A convolution with `long_conv`'s signature as a program of `shape.operands()`; see
    `programs.program`."""

    def forward(u, kernel, kernel_reverse=None):
        return (conv(u, kernel, kernel_reverse=kernel_reverse),)

    return programs.program(forward, shape.operands(), mode)


def case(
    shape: str | Shape,
    implementation: str = "xla",
    mode: str = "forward",
    scale: str = "1",
    method: str = "",
) -> tuple[Any, ...]:
    """`(fn, *operands)` of the op's `program`, for `tools.aot`.

    Args:
      shape: a name in `SHAPES`, or a shape of your own.
      implementation: as in `long_conv`.
      mode: "forward" or "forward+backward".
      scale: factor on the length, as a string so that the command line can give it.
      method: as in `long_conv`, "" for None.

    Raises:
      ValueError: unknown shape or mode, or what `long_conv` refuses.
    """
    chosen = programs.chosen(SHAPES, shape, scale)
    conv = functools.partial(long_conv, implementation=implementation, method=method or None)
    fn, operands = program(conv, chosen, mode)
    return fn, *operands
