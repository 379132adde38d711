"""What the diagonal state-space model is measured against: the same maths written with JAX alone.

Each has the signature of the op it stands in for.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import linear_scan
from pallas_kernels.diagonal_ssm.shapes import named
from pallas_kernels.tools.programs import as_pairs, program


def vandermonde_fft(u, log_a, c, *, initial_state=None, segment_ids=None, reverse=False):
    """The kernel as a product with the table of all powers, `(H, N, L)`, then an FFT: the published
    code of S4D and DSS. An initial state is added through the same table.

    Raises:
      NotImplementedError: `segment_ids` are given.
    """
    if segment_ids is not None:
        raise NotImplementedError("the FFT baseline knows no segments")
    if reverse:
        u = jnp.flip(u, 1)
    length = u.shape[1]
    table = jnp.exp(log_a[..., None] * jnp.arange(length))
    kernel = 2 * jnp.einsum("hn,hnl->hl", c, table).real
    spectrum = jnp.fft.rfft(u, 2 * length, axis=1) * jnp.fft.rfft(kernel.T, 2 * length, axis=0)
    y = jnp.fft.irfft(spectrum, 2 * length, axis=1)[:, :length]
    final = jnp.einsum("blh,hnl->bhn", u, table[..., ::-1])
    if initial_state is not None:
        entering = jnp.exp(log_a) * initial_state
        y = y + 2 * jnp.einsum("bhn,hnl->blh", c * entering, table).real
        final = final + table[..., -1] * entering
    return jnp.flip(y, 1) if reverse else y, final


def expanded_scan(u, log_a, c, *, initial_state=None, segment_ids=None, reverse=False):
    """`linear_scan` over all `H N` states, written out, and contracted."""
    batch, length, width = u.shape
    states = log_a.shape[1]
    drive = jnp.repeat(u, states, axis=-1).astype(jnp.complex64)
    start = None if initial_state is None else initial_state.reshape(batch, -1)
    h, final = linear_scan(
        jnp.exp(log_a).reshape(-1),
        drive,
        initial_state=start,
        segment_ids=segment_ids,
        reverse=reverse,
    )
    h = h.reshape(batch, length, width, states)
    return 2 * jnp.einsum("hn,blhn->blh", c, h).real, final.reshape(batch, width, states)


def sequential_scan(
    u, log_a, c, *, initial_state=None, segment_ids=None, reverse=False, unroll: int = 1
):
    """`jax.lax.scan` over the length with states as carry, `unroll` steps an iteration.

    Raises:
      NotImplementedError: `segment_ids` are given.
    """
    if segment_ids is not None:
        raise NotImplementedError("the scan baseline knows no segments")
    if initial_state is None:
        initial_state = jnp.zeros((u.shape[0], *c.shape), c.dtype)
    a = jnp.exp(log_a)

    def step(h, u_t):
        h = a * h + u_t[..., None]
        return h, 2 * (c * h).real.sum(-1)

    tokens = jnp.moveaxis(u, 1, 0)
    final, y = jax.lax.scan(step, initial_state, tokens, reverse=reverse, unroll=unroll)
    return jnp.moveaxis(y, 0, 1), final


MODELS: dict[str, Any] = {
    "vandermonde fft": vandermonde_fft,
    "expanded scan": expanded_scan,
    "scan, unroll 1": sequential_scan,
    "scan, unroll 8": functools.partial(sequential_scan, unroll=8),
}


def case(shape: str, baseline: str, mode: str, scale: str = "1") -> tuple[Any, ...]:
    """As `pallas_kernels.diagonal_ssm.shapes.case`, of a key of `MODELS`."""
    chosen = named(shape).scaled(float(scale))
    return as_pairs(*program(MODELS[baseline], chosen, mode))
