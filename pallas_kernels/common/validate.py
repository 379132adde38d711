"""Checks of arguments, shared by all ops; every message names the argument and the rule.

Shapes and dtypes are checked when an op is traced. Values are checked where they are at hand
(`values`), whatever the array's class; those of traced arrays, and of arrays on an accelerator, by
`checked(op)`.
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

LOG_DECAY = "it is the logarithm of a decay, such as -softplus(...) or log_sigmoid(...)"


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
    if (known := values(ids)) is not None:
        try:
            segments.check(known)
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None


def values(x: Any) -> np.ndarray | None:
    """The values of `x` where they are at hand: no tracer, and on the host or the CPU backend.

    None for a traced array, and for one on an accelerator: a copy would wait for the device.
    """
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array):
        on_cpu = all(device.platform == "cpu" for device in x.devices())
        return np.asarray(x) if on_cpu and x.is_fully_addressable else None
    return np.asarray(x)


def at_most_zero(op: str, name: str, x: Any, hint: str) -> None:
    """`x`, or its real part, must hold no positive number, where its values are at hand."""
    known = values(x)
    if known is not None and np.any(known.real > 0):
        raise ValueError(
            f"{op}: {name} must be at most 0, got {float(np.nanmax(known.real))}; {hint}"
        )


def checked(op: Callable[..., Any]) -> Callable[..., tuple[checkify.Error, Any]]:
    """`op` that also checks values which are not at hand when it is called (see `values`).

    Returns a function of the same arguments that gives `(error, outputs)`; `error.throw()` raises
    outside of jit with the same rule that concrete arguments are held to.
    """
    signature = inspect.signature(op)

    def check(given: dict[str, Any]) -> None:
        ids = given.get("segment_ids")
        if ids is not None:
            checkify.check(jnp.all(ids >= 0), "segment_ids must be >= 0 (0 is padding)")
            late = (ids[:, :-1] == 0) & (ids[:, 1:] != 0)
            checkify.check(~jnp.any(late), "padding (id 0) may stand only at the end of a row")
        for name in ("log_decay", "A", "log_a"):
            if (x := given.get(name)) is not None:
                checkify.check(~jnp.any(jnp.real(jnp.asarray(x)) > 0), f"{name} must be at most 0")
        for name in ("offset", "past_length"):
            if (x := given.get(name)) is not None:
                checkify.check(jnp.all(x >= 0), f"{name} must be at least 0")
        if (x := given.get("past_length")) is not None:
            most = given["past_k"].shape[1]
            checkify.check(jnp.all(x <= most), f"past_length must be at most P = {most}")

    def run(*args: Any, **kwargs: Any) -> tuple[checkify.Error, Any]:
        given = signature.bind(*args, **kwargs).arguments
        error, _ = checkify.checkify(lambda: check(given))()
        return error, op(*args, **kwargs)

    return run
