"""Sizes that are symbols: the batch of a program that `jax.export` makes for any batch.

A comparison with a symbol has no answer while a program is traced. What a size decides (tiles,
how many rows a loop takes together, whether addresses fit) is decided here without it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax


def is_symbol(size: int) -> bool:
    """Whether a size is a symbol or computed from one."""
    return jax.export.is_symbolic_dim(size)


def known(size: int, otherwise: int) -> int:
    """`size`, or `otherwise` where it is a symbol or computed from one."""
    return otherwise if is_symbol(size) else size


def gpu_refusals(batch: int, what: str, largest: Callable[[], int]) -> dict[str, str]:
    """Why the GPU kernels of an op cannot serve a call, by implementation; empty if they can.

    Args:
      batch: size of the batch.
      what: the array of `largest()` elements, for the message.
      largest: elements of the largest array that a kernel addresses; not called for a symbol.
    """
    if is_symbol(batch):
        return {"gpu": f"Triton needs a grid that is known when it is traced, the batch is {batch}"}
    if (count := largest()) >= 2**31:
        return {"gpu": f"{what} has {count} elements, its addresses hold 2**31"}
    return {}
