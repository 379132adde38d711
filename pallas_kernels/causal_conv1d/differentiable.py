"""The custom VJP that is the same for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.common import vjp


def differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`op((activation,), x, weight, bias, initial_state, runs)` of a backend's two functions.

    Args:
      forward: `(x, weight, bias, initial_state, runs, activation) -> y`.
      backward: `(x, weight, bias, initial_state, runs, dy, activation)
        -> (dx, dweight, dbias, dinitial_state)`.
    """

    def primal(config, *arrays):
        return forward(*arrays, *config)

    def forward_and_residuals(config, *arrays):
        return primal(config, *arrays), arrays

    def gradients(config, residuals, dy):
        return *backward(*residuals, dy, *config), None

    return vjp.join(primal, forward_and_residuals, gradients)
