import jax.numpy as jnp

from pallas_kernels import segments
from pallas_kernels.linear_scan import reference


def linear_scan(a, b, *, initial_state=None, segment_ids=None, reverse=False, implementation=None):
    state_dtype = jnp.promote_types(b.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((b.shape[0], b.shape[2]), state_dtype)
    runs = None if segment_ids is None else segments.runs(segment_ids)
    return reference.linear_scan(a, b, initial_state, runs, reverse=reverse)
