"""Both directions in blocks of time whose states stay in the cache of a CPU.

Project a block, scan it, read it out. The backward pass keeps the states between blocks and does
the rest again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat
from pallas_kernels.common.backend import Backend

# Tokens a block, of all rows together; measured on x86 with 2 cores, at 128 channels and 128
# states.
_ROWS = 1024

_dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)


def prepare(config: None, u, decay, input_projection, output_projection, segment_index):
    """The arrays of `forward`, and `restore`: `(T, B, H)` blocks to `((B, L, H),)`."""
    assert segment_index is None, "blocks take one document a row"
    batch, length, width = u.shape
    steps = min(length, max(64, _ROWS // batch))
    x = jnp.moveaxis(jnp.pad(u, ((0, 0), (0, -length % steps), (0, 0))), 1, 0)
    x = x.reshape(-1, steps, batch, width)

    def restore(y):
        return (jnp.moveaxis(y.reshape(-1, batch, width), 0, 1)[:, :length],)

    return (x, decay.real, decay.imag, input_projection, *jnp.split(output_projection, 2)), restore


# Time is first: a block is (T, B, H), and (T, B, 2P) before it is split into real and imaginary
# part; a state is a pair of planes (B, P).


def _loop(body, carry, inputs, *, reverse: bool):
    """`jax.lax.scan` whose carry is typed, under `jax.shard_map`, as what it will become."""
    like = jax.tree.leaves(inputs)[0]
    carry = jax.tree.map(lambda leaf: compat.match_vma(leaf, like)[0], carry)
    return jax.lax.scan(body, carry, inputs, reverse=reverse)


def _scan(flow, state, decay, *, reverse: bool):
    """`(state after the last step, states)` of `s_t = decay s_{t-1} + flow_t`."""
    re, im = decay

    def step(state, x):
        a, b = state
        state = (re[None] * a - im[None] * b + x[:, 0], re[None] * b + im[None] * a + x[:, 1])
        return state, state

    return _loop(step, state, _parts(flow), reverse=reverse)


def _parts(x):
    """`(T, B, 2P)` -> `(T, B, 2, P)`."""
    return x.reshape(*x.shape[:-1], 2, -1)


def _zeros(x, decay):
    zero = jnp.zeros((x.shape[2], decay.size), x.dtype)
    return zero, zero


def _read(states, projection):
    """What the states give to the outputs; `projection` has the rows of the real parts first."""
    return sum(_dot(z, c) for z, c in zip(states, jnp.split(projection, 2), strict=True))


def forward(config: None, x, re, im, into, left, right, *, return_residuals: bool):
    """`y (blocks, T, B, H)`, and the states that enter the blocks of each direction."""

    def one_way(projection, reverse):
        def block(state, x):
            after, states = _scan(_dot(x, into), state, (re, im), reverse=reverse)
            return after, (_read(states, projection), state)

        return _loop(block, _zeros(x, re), x, reverse=reverse)[1]

    (y, entering), (z, returning) = one_way(left, False), one_way(right, True)
    return y + z, (x, re, im, into, left, right, entering, returning) if return_residuals else None


def backward(config: None, residuals, dy):
    """The way from the right first. What flows into its states, and what does into those of the
    other way, then go into the products for `x` and `into` as one sum."""
    x, re, im, into, left, right, entering, returning = residuals
    start = (_zeros(x, re), _zeros(x, re)), jnp.zeros_like(left)

    def through(carry, inputs, projection, *, reverse):
        (behind, dprojection), (x, dy, state) = carry, inputs
        _, states = _scan(_dot(x, into), state, (re, im), reverse=reverse)
        dstates = _dot(dy, projection.T)
        behind, dflow = _scan_back(dstates, states, behind, (re, -im), reverse=reverse)
        dprojection = dprojection + jnp.concatenate([_outer(z, dy) for z in states])
        return (behind, dprojection), dflow

    def from_the_right(carry, inputs):
        return through(carry, inputs, right, reverse=True)

    def from_the_left(carry, inputs):
        (ways, dinto), (x, dy, state, other) = carry, inputs
        ways, dflow = through(ways, (x, dy, state), left, reverse=False)
        dflow = jax.tree.map(jnp.add, dflow, other)
        dinto = dinto + jnp.concatenate([_outer(x, d) for d in dflow], axis=-1)
        return (ways, dinto), _read(dflow, into.T)

    ((_, ddecay), dright), flows = _loop(from_the_right, start, (x, dy, returning), reverse=False)
    (((_, other), dleft), dinto), dx = _loop(
        from_the_left, (start, jnp.zeros_like(into)), (x, dy, entering, flows), reverse=True
    )
    dre, dim = (jnp.sum(a + b, axis=0) for a, b in zip(ddecay, other, strict=True))
    return dx, dre, dim, dinto, dleft, dright


def _scan_back(dstates, states, behind, conjugate, *, reverse: bool):
    """Gradients of what flows into a block, `d_t = conj(a) d_{t+1} + dstates_t`.

    Of `behind`, and of what is returned in its place for the block before, the first is the last
    `d`, the second the sum of `conj(states_t) d_{t+1}` so far, the gradient of the decay.
    """
    re, im = conjugate

    def step(behind, inputs):
        (p, q), (dre, dim) = behind
        d, (a, b) = inputs
        ddecay = (dre + a * p + b * q, dim + a * q - b * p)
        now = (re[None] * p - im[None] * q + d[:, 0], re[None] * q + im[None] * p + d[:, 1])
        return (now, ddecay), now

    return _loop(step, behind, (_parts(dstates), states), reverse=not reverse)


def _outer(x, y):
    """`x^T y` over all tokens."""
    return _dot(x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]))


BACKEND = Backend(forward, backward, prepare)
