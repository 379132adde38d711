"""What all TPU kernels know of a TPU: the shape of a register, the memory that blocks may take."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.common import segments
from pallas_kernels.common.compat import pl

LANES, SUBLANES = 128, 8  # of a register of 32-bit numbers

# Bytes of VMEM that a kernel's blocks may take. A kernel that asks for no more than the compiler
# gives by itself has 16 MiB on the smallest TPU; one that asks for `VMEM_LIMIT` leaves the rest of
# it to the compiler's temporaries. The smallest memory is 64 MiB, on tpu7x.
SMALL_VMEM_BUDGET = 12 * 2**20
VMEM_BUDGET = 2**25
VMEM_LIMIT = 3 * 2**24


def round_up(x: int, multiple: int) -> int:
    """The least multiple that is not below `x`."""
    return -(-x // multiple) * multiple


def sequence_begins() -> jax.Array:
    """True in the first block of a sequence in the direction of travel, the grid's third axis."""
    return pl.program_id(2) == 0


def over_lanes(codes: jax.Array) -> jax.Array:
    """A code for each token over a row of lanes, `(B, L) -> (B, L, 128)`, as kernels read it."""
    return jnp.broadcast_to(codes[:, :, None], (*codes.shape, LANES))


def step_code_operands(segment_index: jax.Array | None, *, reverse: bool) -> list[jax.Array]:
    """`segments.step_codes` over a row of lanes, as a list of at most one operand."""
    if segment_index is None:
        return []
    return [over_lanes(segments.step_codes(segment_index, reverse=reverse))]
