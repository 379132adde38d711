"""Checks of arguments, shared by all ops; every message names the argument and the rule.

Shapes and dtypes are checked when an op is traced. Values can be checked only where they are
known: concrete segment ids at once, traced ones by `checked(op)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from pallas_kernels.common import segments


def shape(op: str, name: str, x: Any, rule: str, sizes: Sequence[int | None]) -> None:
    """`x` must have these sizes; None is any size."""
    fits = len(x.shape) == len(sizes) and all(
        size is None or size == actual for size, actual in zip(sizes, x.shape, strict=True)
    )
    if not fits:
        known = tuple("any" if size is None else size for size in sizes)
        raise ValueError(
            f"{op}: {name} must be {rule}"
            f"{'' if all(s is None for s in sizes) else f' = {known}'}, got shape {x.shape}"
        )


def dtype(op: str, name: str, x: Any, allowed: Sequence[str], because: str = "") -> None:
    """`x` must have one of these dtypes."""
    if x.dtype.name not in allowed:
        raise ValueError(
            f"{op}: {name} must be {' or '.join(allowed)}{f' since {because}' if because else ''}, "
            f"got {x.dtype}; cast it with {name}.astype({allowed[0]!r})"
        )


def segment_ids(op: str, ids: Any, batch: int, length: int) -> None:
    """`ids` must be `(B, L)` int32, and in order where their values are known."""
    shape(op, "segment_ids", ids, "(B, L)", (batch, length))
    dtype(op, "segment_ids", ids, ("int32",))
    if not isinstance(ids, jax.core.Tracer):
        try:
            segments.check(ids)
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None


def at_most_zero(op: str, name: str, x: Any) -> None:
    """`x` must hold no positive number, checked where its values are at hand (numpy, Python)."""
    if isinstance(x, jax.Array) or not np.any(np.asarray(x) > 0):
        return
    raise ValueError(
        f"{op}: {name} must be at most 0, got {np.max(x)}; it is the logarithm of a decay, such as "
        "-softplus(...) or log_sigmoid(...)"
    )


def checked(op: Callable[..., Any]) -> Callable[..., tuple[checkify.Error, Any]]:
    """`op` that also checks values which are known only when a jitted program runs.

    Returns a function of the same arguments that gives `(error, outputs)`; `error.throw()` raises
    outside of jit with the same rule that concrete arguments are held to.
    """
    signature = inspect.signature(op)

    def check(ids: jax.Array | None, log_decay: jax.Array | None) -> None:
        if ids is not None:
            checkify.check(jnp.all(ids >= 0), "segment_ids must be >= 0 (0 is padding)")
            late = (ids[:, :-1] == 0) & (ids[:, 1:] != 0)
            checkify.check(~jnp.any(late), "padding (id 0) may stand only at the end of a row")
        if log_decay is not None:
            checkify.check(jnp.all(log_decay <= 0), "log_decay must be at most 0")

    def run(*args: Any, **kwargs: Any) -> tuple[checkify.Error, Any]:
        arguments = signature.bind(*args, **kwargs).arguments
        values = (arguments.get("segment_ids"), arguments.get("log_decay"))
        error, _ = checkify.checkify(lambda: check(*values))()
        return error, op(*args, **kwargs)

    return run
