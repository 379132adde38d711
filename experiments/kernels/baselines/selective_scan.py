"""What the selective scan is measured against: the same maths without a kernel.

The ones in JAX have the signature of the op they stand in for, without gate and documents.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def associative_scan(x, dt, A, B, C, D, *, initial_state, dt_softplus=False, reverse=False):
    """`jax.lax.associative_scan` over the expanded state, `(B, L, D, N)`."""
    _plain(dt_softplus, reverse)
    decay = jnp.exp(dt[..., None] * A)
    written = (dt * x)[..., None] * B[:, :, None]
    written = written.at[:, 0].add(decay[:, 0] * initial_state)

    def combine(before, after):
        return after[0] * before[0], after[0] * before[1] + after[1]

    h = jax.lax.associative_scan(combine, (decay, written), axis=1)[1]
    return jnp.einsum("bldn,bln->bld", h, C) + D * x, h[:, -1]


def sequential_scan(
    x, dt, A, B, C, D, *, initial_state, dt_softplus=False, reverse=False, unroll: int = 1
):
    """`jax.lax.scan` over the length, `unroll` steps an iteration, differentiated by JAX."""
    _plain(dt_softplus, reverse)

    def step(h, token):
        x, dt, B, C = token
        h = jnp.exp(dt[..., None] * A) * h + (dt * x)[..., None] * B[:, None]
        return h, jnp.einsum("bdn,bn->bd", h, C) + D * x

    tokens = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (x, dt, B, C))
    final, y = jax.lax.scan(step, initial_state, tokens, unroll=unroll)
    return jnp.moveaxis(y, 0, 1), final


SCANS: dict[str, Any] = {
    "associative_scan": associative_scan,
    "scan, unroll 1": sequential_scan,
    "scan, unroll 8": functools.partial(sequential_scan, unroll=8),
}


def torch_loop(arrays: tuple[Any, ...]) -> Any:
    """Forward and backward of the loop over tokens in PyTorch, which its users have on a CPU.

    Args:
      arrays: numpy arrays `(x, dt, A, B, C, D, initial_state, dy)`.

    Returns:
      A function without arguments that gives `(y, gradients)` as numpy arrays.

    Raises:
      ImportError: PyTorch is not installed; it is no requirement of this project.
    """
    import torch

    *inputs, dy = (torch.from_numpy(z.copy()) for z in arrays)

    def run():
        given = [z.detach().requires_grad_() for z in inputs]
        x, dt, A, B, C, D, h = given
        decay = torch.exp(dt[..., None] * A)
        written = (dt * x)[..., None] * B[:, :, None]
        read = []
        # Unbound beforehand: the gradient of an index in the loop is as large as all tokens.
        for keep, write, c in zip(*(z.unbind(1) for z in (decay, written, C)), strict=True):
            h = keep * h + write
            read.append(torch.einsum("bdn,bn->bd", h, c))
        y = torch.stack(read, 1) + D * x
        y.backward(dy)
        return y.detach().numpy(), tuple(np.asarray(z.grad) for z in given)

    return run


def _plain(dt_softplus, reverse):
    if dt_softplus or reverse:
        raise NotImplementedError("the baselines know no softplus of dt and no reverse")
