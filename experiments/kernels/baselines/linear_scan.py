"""What the linear scan is measured against: the same maths as one would write it with JAX alone.

Each has the signature of the op it stands in for.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_scan.shapes import named
from pallas_kernels.tools.programs import as_pairs, program


def associative_scan(a, b, *, initial_state=None, segment_ids=None, reverse=False):
    """`jax.lax.associative_scan` over the length, as the codes of S5 and LRU have it.

    An initial state is folded into the first input.

    Raises:
      NotImplementedError: `segment_ids` are given.
    """
    _no_segments(segment_ids)
    a = jnp.broadcast_to(a, b.shape).astype(b.dtype)
    first = b.shape[1] - 1 if reverse else 0
    if initial_state is not None:
        entering = (a[:, first] * initial_state).astype(b.dtype)
        b = b.at[:, first].add(entering)

    def combine(before, after):
        return after[0] * before[0], after[0] * before[1] + after[1]

    h = jax.lax.associative_scan(combine, (a, b), axis=1, reverse=reverse)[1]
    return h, h[:, b.shape[1] - 1 - first]


def sequential_scan(a, b, *, initial_state=None, segment_ids=None, reverse=False, unroll: int = 1):
    """`jax.lax.scan` over the length, `unroll` steps an iteration.

    Raises:
      NotImplementedError: `segment_ids` are given.
    """
    _no_segments(segment_ids)
    if initial_state is None:
        initial_state = jnp.zeros((b.shape[0], b.shape[2]), jnp.promote_types(b.dtype, "float32"))
    inputs = jnp.moveaxis(b, 1, 0)
    decays = None if a.ndim == 1 else jnp.moveaxis(a, 1, 0)

    def step(h, token):
        decay, value = token
        h = (a[None] if decay is None else decay) * h + value
        return h, h.astype(b.dtype)

    final, h = jax.lax.scan(step, initial_state, (decays, inputs), reverse=reverse, unroll=unroll)
    return jnp.moveaxis(h, 0, 1), final


SCANS: dict[str, Any] = {
    "associative_scan": associative_scan,
    "scan, unroll 1": sequential_scan,
    "scan, unroll 8": functools.partial(sequential_scan, unroll=8),
}


def case(shape: str, baseline: str, mode: str, scale: str = "1") -> tuple[Any, ...]:
    """As `pallas_kernels.linear_scan.shapes.case`, of a key of `SCANS`."""
    return as_pairs(*program(SCANS[baseline], named(shape).scaled(float(scale)), mode))


def _no_segments(segment_ids):
    if segment_ids is not None:
        raise NotImplementedError("the baselines know no segments")
