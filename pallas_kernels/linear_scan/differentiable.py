"""What the backends' forward and backward passes need of each other: only `h`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.common import vjp


def differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`linear_scan(config, a, b, initial_state, runs)` of one backend, with its derivative.

    Args:
      forward: `(a, b, initial_state, runs, *config) -> (h, final_state)`.
      backward: `(a, h, initial_state, runs, dh, dfinal_state, *config) -> (da, db,
        dinitial_state)`.

    `config` is `(reverse,)`, and the tiles behind it where a test sets them.
    """

    def primal(config, *arrays):
        return forward(*arrays, *config)

    def keep(config, a, b, initial_state, runs):
        h, final_state = forward(a, b, initial_state, runs, *config)
        return (h, final_state), (a, h, initial_state, runs)

    def pull_back(config, residuals, cotangents):
        return *backward(*residuals, *cotangents, *config), None

    return vjp.join(primal, keep, pull_back)
