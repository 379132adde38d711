"""The maths of one step and of one tile, on values; shared by every backend.

Numbers are planes, see `common.planes`.

    forward    h_t = a_t h_{t-1} + b_t
    backward   G_t = dh_t + c_{t+1},   c_t = a_t G_t,   db_t = G_t,   da_t = G_t h_{t-1}

where `c` is the cotangent that flows on to the state before; the cotangent of the final state
enters as the last `c` and the one of the initial state leaves as the first. JAX's convention for
complex cotangents needs no conjugates. Step codes are those of `segments.step_codes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.planes import Planes, add, is_zero, mul, ones_like, where, zeros_like
from pallas_kernels.common.segments import ENTER, RESET, SKIP, step_codes


class Config(NamedTuple):
    """What is static about a scan.

    Attributes:
      reverse: from the last token to the first.
      tiles: the backend's own `Tiles`; None for what suits the shape.
    """

    reverse: bool
    tiles: Any = None


def step_decay(a: Planes, code: jax.Array | None) -> Planes:
    """What the state before is multiplied by: `a`, 0 at a reset, 1 on padding."""
    if code is None:
        return a
    a = where(code == SKIP, ones_like(a), a)
    return where(code == RESET, zeros_like(a), a)


def compose(product: Planes, a: Planes, code: jax.Array | None) -> Planes:
    """The product of decays with one more step; a reset wins over an infinity."""
    longer = mul(product, step_decay(a, code))
    return longer if code is None else where(code == RESET, zeros_like(product), longer)


def advance(h: Planes, a: Planes, b: Planes, code: jax.Array | None) -> Planes:
    """One step forward: `h_t` from `h_{t-1}`.

    A reset selects instead of multiplying by zero: an overflowed document stays its own affair.
    """
    after = add(mul(a, h), b)
    if code is None:
        return after
    return where(code == SKIP, h, where(code == RESET, b, after))


def retreat(c: Planes, a: Planes, dh: Planes, code: jax.Array | None) -> tuple[Planes, Planes]:
    """One step backward: `(G_t, c_t)` from `c_{t+1}` and the cotangent of `h_t`."""
    gradient = add(dh, c)
    before = mul(a, gradient)
    if code is None:
        return gradient, before
    before = where(code == SKIP, c, where(code == RESET, zeros_like(c), before))
    return where(code == SKIP, zeros_like(gradient), gradient), before


def decay_gradient(gradient: Planes, h_before: Planes, code: jax.Array | None) -> Planes:
    """`da_t = G_t h_{t-1}`; zero where the step did not use `a_t`."""
    da = mul(gradient, h_before)
    if code is None:
        return da
    return where((code == RESET) | (code == SKIP), zeros_like(da), da)


def state_before(h_before: Planes, initial_state: Planes, code: jax.Array | None) -> Planes:
    """`h_{t-1}` from the saved outputs; they are 0 on the padding before the first token."""
    return h_before if code is None else where(code == ENTER, initial_state, h_before)


def row_decay(a: jax.Array, codes: jax.Array | None, length: int) -> jax.Array:
    """The product of a row's decays, `(B, D)` or `(1, D)`: 0 where a document begins inside.

    Args:
      a: `(B, L, D)`, or `(D,)` for one decay of all steps.
      codes: step codes `(B, L)`, or None where every step is a plain one.
      length: L.
    """
    constant = a.ndim == 1
    if codes is None:
        return a[None] ** length if constant else jnp.prod(a, axis=1)
    (a,) = step_decay((a[None, None] if constant else a,), codes[:, :, None])
    return jnp.prod(a, axis=1)


def summary(run, config: Config, a, b, initial_state, segment_index):
    """`(decay, state)`, each `(B, D)`; see `backend.summarize`."""
    codes = None if segment_index is None else step_codes(segment_index, reverse=config.reverse)
    decay = row_decay(a.astype(initial_state.dtype), codes, b.shape[1])
    _, state = run(config, a, b, initial_state, segment_index)
    return jnp.broadcast_to(decay, state.shape), state


def prefix(
    decay: Planes,
    value: Planes,
    shift: Callable[[jax.Array, int], jax.Array],
    index: jax.Array,
    size: int,
    *,
    segmented: bool,
) -> tuple[Planes, Planes]:
    """Inclusive scan of the maps `h -> decay h + value` over `size` rows held at once.

    Hillis and Steele's log-step scan: after step k each row holds the map of the 2k rows up to
    itself. `shift(x, k)` moves rows by k in the direction of travel and may leave anything in the
    first k (they are masked by `index`, the position of each row in the direction of travel).

    Args:
      segmented: decays may be exactly 0 at resets; then what lies before is dropped by a select,
        so that not even an infinity gets through.

    Returns:
      `(decay, value)` of the maps from before the first row to after each row.
    """
    step = 1
    while step < size:
        inside = index >= step
        before = tuple(shift(p, step) for p in value)
        value = where(inside, apply(decay, value, before, segmented=segmented), value)
        before = tuple(shift(p, step) for p in decay)
        longer = mul(decay, before)
        if segmented:
            longer = where(is_zero(decay) | is_zero(before), zeros_like(longer), longer)
        decay = where(inside, longer, decay)
        step *= 2
    return decay, value


def apply(decay: Planes, value: Planes, h: Planes, *, segmented: bool) -> Planes:
    """The maps `h -> decay h + value` applied to `h`."""
    carried = mul(decay, h)
    if segmented:
        carried = where(is_zero(decay), zeros_like(carried), carried)
    return add(carried, value)
