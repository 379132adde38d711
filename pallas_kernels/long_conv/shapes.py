"""Shapes of long convolutions in published models: what tests compile and benchmarks time."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.long_conv.api import OP, long_conv
from pallas_kernels.tools import programs
from pallas_kernels.tools.family import Family
from pallas_kernels.tools.programs import Struct


@dataclasses.dataclass(frozen=True)
class Shape(programs.Shape):
    """One use of the convolution.

    Attributes:
      batch, length, width: B, L, H of `u (B, L, H)`.
      kernel_size: Lk, also Lr; None is L.
      two_sided: there is a `kernel_reverse`.
      dtype: "float32" or "bfloat16", of `u`; filters are float32.
    """

    width: int
    kernel_size: int | None = None
    two_sided: bool = False
    dtype: str = "float32"

    def operands(self) -> dict[str, Struct]:
        """`u (B, L, H)`, `kernel (H, Lk)` and, if two-sided, `kernel_reverse (H, Lk)`."""
        kernel = Struct((self.width, self.kernel_size or self.length), jnp.float32)
        operands = {"u": Struct((self.batch, self.length, self.width), self.dtype)}
        operands["kernel"] = kernel
        if self.two_sided:
            operands["kernel_reverse"] = kernel
        return operands


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
        Shape("odd", _ODD, 3, 1000, 60, kernel_size=333, two_sided=True),
        Shape("short", _ODD, 2, 15, 130, kernel_size=40),
    )
}

FAMILY = Family(
    long_conv,
    OP,
    SHAPES,
    # Two-sided and one-sided.
    representatives=("s4-listops", "hyena-153m"),
    has_kernels=False,
)
case, named = FAMILY.case, FAMILY.named
