"""By the name of an op, what a row does to any state that enters it, as ``(decay, state)``.

Linear attention needs no more than its decay and ``entering``, what a state adds to its outputs.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.delta_rule import summary as delta_rule
from pallas_kernels.diagonal_ssm import summary as diagonal_ssm
from pallas_kernels.linear_attention import entering as entering
from pallas_kernels.linear_scan import summary as linear_scan
from pallas_kernels.matrix_state.config import row_decay
from pallas_kernels.selective_scan import summary as selective_scan

__all__ = [
    "decay_of_linear_attention",
    "delta_rule",
    "diagonal_ssm",
    "entering",
    "linear_scan",
    "selective_scan",
]


def decay_of_linear_attention(state: Array, log_decay: Any, segment_ids: Any, v: Array) -> Array:
    """What a row leaves of each key of an entering state, ``(B, H, K or 1, 1)``."""
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, v.shape[:3])
    return row_decay(log_decay, segment_ids, state)
