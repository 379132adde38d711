"""How an implementation's forward and backward become one differentiable function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def join(
    primal: Callable[..., Any], forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`op(config, *arrays)` whose derivative is written by hand.

    Args:
      primal: `(config, *arrays) -> outputs`, what runs where nobody differentiates.
      forward: `(config, *arrays) -> (outputs, residuals)`.
      backward: `(config, residuals, cotangents) -> gradients`, one for each array, None for
        integers. A residual is an array or None.

    `config` is static and hashable: a frozen dataclass or a named tuple.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def op(config, *arrays):
        return primal(config, *arrays)

    op.defvjp(forward, backward)
    return op
