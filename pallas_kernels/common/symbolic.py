"""Sizes that are symbols: the batch of a program that `jax.export` makes for any batch.

A comparison with a symbol has no answer while a program is traced. What a size decides (tiles,
how many rows a loop takes together, whether addresses fit) is decided here without it.
"""

from __future__ import annotations

import jax


def is_symbol(size: int) -> bool:
    """Whether a size is a symbol or computed from one."""
    return jax.export.is_symbolic_dim(size)


def known(size: int, otherwise: int) -> int:
    """`size`, or `otherwise` where it is a symbol or computed from one."""
    return otherwise if is_symbol(size) else size
