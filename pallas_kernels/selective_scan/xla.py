"""The portable path: one loop over time whose step stays in the cache.

A few rows at a time, so that the states `(rows, N, D)` of one step fit a core's cache, are taken
through all tokens by a loop of few fused operations; channels come last because that is where a CPU
vectorises. The forward pass keeps the state at the start of every chunk of steps. The backward pass
walks the chunks from the last to the first: it computes the states of one chunk again and then
walks it backwards, with `c` the cotangent of the state:

    G_t = c_t + C_t dy_t,   c_{t-1} = exp(dt_t A) G_t

Sums over N and D are written as dot products: XLA's reductions on a CPU are many times slower.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, segments, symbolic
from pallas_kernels.common.backend import Backend
from pallas_kernels.selective_scan.tile import Config

# What one step touches should fit a core's cache; smaller steps cost more in overhead. Measured on
# x86 between 2**11 and 2**17: flat from 2**12 to 2**14.
_STATES_A_STEP = 2**14
_CHUNK = 64


def prepare(config: Config, x, dt, A, B, C, D, gate, dt_bias, initial_state, segment_index):
    """The recurrence's own arrays; `restore` adds D and the gate. JAX differentiates both."""
    dtype = initial_state.dtype
    live = None if segment_index is None else (segment_index != 0)[:, :, None]
    # Padding is a token that does nothing: dt = 0 keeps the state to the bit. What it holds is
    # dropped before anything is computed from it.
    x, dt, B, C, gate = (_where(live, z) for z in (x, dt, B, C, gate))
    dt = _where(live, step_size(config, dt.astype(dtype), dt_bias))
    resets = None if segment_index is None else _resets(segment_index, reverse=config.reverse)

    def restore(outputs):
        y, final_state = outputs
        if D is not None:
            # Not D[None, None]: of that, XLA sums the gradient of a single row 20 times slower.
            y = y + jnp.broadcast_to(D, x.shape) * x.astype(dtype)
        if gate is not None:
            y = y * jax.nn.silu(gate.astype(dtype))
        return _where(live, y).astype(x.dtype), final_state

    return (x, dt, A, B, C, initial_state, resets), restore


def step_size(config: Config, dt, dt_bias):
    """dt as the recurrence sees it; the softplus never takes the exponential of a positive."""
    if dt_bias is not None:
        dt = dt + jnp.broadcast_to(dt_bias, dt.shape)
    return jax.nn.softplus(dt) if config.dt_softplus else dt


def _where(live, z):
    """`z`, zero on padding."""
    return z if live is None or z is None else jnp.where(live, z, jnp.zeros_like(z))


def _resets(segment_index, *, reverse: bool):
    return segments.step_codes(segment_index, reverse=reverse) == segments.RESET


def one_token(config: Config, *arrays):
    """A decoding step: no loops; JAX differentiates it. One token never resets."""
    (*tokens, initial_state, _), restore = prepare(config, *arrays)
    x, dt, A, B, C = tokens
    x, dt, B, C = (z[:, 0].astype(initial_state.dtype) for z in (x, dt, B, C))
    decay = jnp.exp(dt[:, :, None] * A[None])
    h = decay * initial_state + (dt * x)[:, :, None] * B[:, None, :]
    return restore((jnp.einsum("bdn,bn->bd", h, C)[:, None], h))


# The loops. Inside, time is first, a group of rows second, channels last.


class _Cut(NamedTuple):
    """`groups` of `rows` rows, `chunks` of `steps` steps; zeros are added to fill them."""

    batch: int
    length: int
    groups: int
    rows: int
    chunks: int
    steps: int

    def tokens(self, z):
        """`(B, L, ...) -> (groups, chunks, steps, rows, ...)`."""
        if z is None:
            return None
        z = self.fill_rows(z)
        fill = self.chunks * self.steps - self.length
        z = jnp.pad(z, ((0, 0), (0, fill)) + ((0, 0),) * (z.ndim - 2))
        z = z.reshape(self.groups, self.rows, self.chunks, self.steps, *z.shape[2:])
        return jnp.moveaxis(z, 1, 3)

    def untokens(self, z):
        """The inverse of `tokens`."""
        z = jnp.moveaxis(z, 3, 1)
        z = z.reshape(self.groups * self.rows, self.chunks * self.steps, *z.shape[4:])
        return z[: self.batch, : self.length]

    def fill_rows(self, z):
        fill = self.groups * self.rows - self.batch
        return jnp.pad(z, ((0, fill),) + ((0, 0),) * (z.ndim - 1))

    def states(self, h):
        """`(B, D, N) -> (groups, rows, N, D)`."""
        h = jnp.swapaxes(self.fill_rows(h), 1, 2)
        return h.reshape(self.groups, self.rows, *h.shape[1:])

    def unstates(self, h):
        """The inverse of `states`."""
        h = h.reshape(self.groups * self.rows, *h.shape[2:])[: self.batch]
        return jnp.swapaxes(h, 1, 2)


def cut(batch: int, length: int, states: int, at_once: int | None = None) -> _Cut:
    """How rows with `states` numbers each and `length` tokens are cut; a step touches `at_once`."""
    at_once = at_once or _STATES_A_STEP
    groups = symbolic.known(-(-batch // max(1, at_once // states)), 1)
    chunks = -(-length // _CHUNK)
    return _Cut(batch, length, groups, -(-batch // groups), chunks, -(-length // chunks))


def _loop(body, carry, inputs, *, reverse: bool):
    """`jax.lax.scan` whose carry is typed, under `jax.shard_map`, as what it will become."""
    like = jax.tree.leaves(inputs)[0]
    carry = jax.tree.map(lambda leaf: compat.match_vma(leaf, like)[0], carry)
    return jax.lax.scan(body, carry, inputs, reverse=reverse)


def _map(body, inputs):
    """`jax.lax.map`, without a loop around a single group."""
    if jax.tree.leaves(inputs)[0].shape[0] == 1:
        return jax.tree.map(lambda z: z[None], body(jax.tree.map(lambda z: z[0], inputs)))
    return jax.lax.map(body, inputs)


class _Token(NamedTuple):
    """One token of a group of rows, in the state's dtype."""

    x: jax.Array  # (rows, D)
    dt: jax.Array  # (rows, D)
    B: jax.Array  # (rows, N)
    reset: jax.Array | None  # (rows,)

    @classmethod
    def load(cls, token, dtype) -> _Token:
        x, dt, B, reset = token
        return cls(x.astype(dtype), dt.astype(dtype), B.astype(dtype), reset)

    def decay(self, A):
        """`(rows, N, D)`; at a reset too, where the state it multiplies is zero."""
        return jnp.exp(self.dt[:, None, :] * A[None])

    def kept(self, h):
        """`h`, zero where a document begins: selected, for an overflowed one may hold infinity."""
        if self.reset is None:
            return h
        return jnp.where(self.reset[:, None, None], jnp.zeros_like(h), h)

    def advance(self, A, h):
        """The state after this token from the one that enters it."""
        return self.decay(A) * h + (self.dt * self.x)[:, None, :] * self.B[:, :, None]


def _over_states(h, weights):
    """`sum_n h[n, d] weights[n]` of each row."""
    return jnp.einsum("rnd,rn->rd", h, weights, precision="highest")


def _over_channels(h, weights):
    """`sum_d h[n, d] weights[d]` of each row."""
    return jnp.einsum("rnd,rd->rn", h, weights, precision="highest")


def forward(config: Config, x, dt, A, B, C, initial_state, resets, *, return_residuals: bool):
    """`((y, final_state), residuals)` of the recurrence alone: dt is final, y lacks D and the gate.

    Args:
      config: its `reverse`.
      x, dt: `(B, L, D)`.
      A: `(D, N)`.
      B, C: `(B, L, N)`.
      initial_state: `(B, D, N)`; all maths is in its dtype, as is y.
      resets: `(B, L)` bool, where a document begins that is not the row's first, or None.
    """
    dtype = initial_state.dtype
    sizes = cut(x.shape[0], x.shape[1], A.size, config.tiles)

    def step(h, token):
        *token, C_t = token
        token = _Token.load(token, dtype)
        h = token.advance(A.T, token.kept(h))
        return h, _over_states(h, C_t.astype(dtype))

    def chunk(h, tokens):
        after, y = _loop(step, h, tokens, reverse=config.reverse)
        return after, (y, h)

    def group(inputs):
        tokens, initial = inputs
        return _loop(chunk, initial, tokens, reverse=config.reverse)

    tokens = jax.tree.map(sizes.tokens, (x, dt, B, resets, C))
    final, (y, entering) = _map(group, (tokens, sizes.states(initial_state)))
    outputs = sizes.untokens(y), sizes.unstates(final)
    return outputs, (x, dt, A, B, C, entering, resets) if return_residuals else None


def backward(config: Config, residuals, cotangents):
    """Gradients of `(x, dt, A, B, C, initial_state, resets)` from those of `(y, final_state)`."""
    x, dt, A, B, C, entering, resets = residuals
    dy, dfinal_state = cotangents
    dtype = dfinal_state.dtype
    sizes = cut(x.shape[0], x.shape[1], A.size, config.tiles)
    ones = jnp.ones((sizes.rows, A.shape[1]), dtype)

    def again(h, token):
        *token, dy_t = token
        token = _Token.load(token, dtype)
        h = token.kept(h)
        after = token.advance(A.T, h)
        return after, (h, _over_channels(after, dy_t.astype(dtype)))

    def retreat(carry, token):
        c, dA = carry
        *token, C_t, dy_t, h = token
        token = _Token.load(token, dtype)
        gradient = c + C_t.astype(dtype)[:, :, None] * dy_t.astype(dtype)[:, None, :]
        c = token.decay(A.T) * gradient
        dexponent = c * h  # of dt_t A
        written = _over_states(gradient, token.B)
        ddt = token.x * written + _over_states(dexponent * A.T[None], ones)
        dB = _over_channels(gradient, token.dt * token.x)
        dA = dA + token.dt[:, None, :] * dexponent
        return (token.kept(c), dA), (token.dt * written, ddt, dB)

    def chunk(carry, tokens):
        *token, C, dy, h = tokens
        _, (h, dC) = _loop(again, h, (*token, dy), reverse=config.reverse)
        carry, gradients = _loop(retreat, carry, (*token, C, dy, h), reverse=not config.reverse)
        return carry, (*gradients, dC)

    def group(inputs):
        tokens, dfinal = inputs
        carry = dfinal, jnp.zeros_like(dfinal)
        return _loop(chunk, carry, tokens, reverse=not config.reverse)

    tokens = (*jax.tree.map(sizes.tokens, (x, dt, B, resets, C, dy)), entering)
    (c, dA), gradients = _map(group, (tokens, sizes.states(dfinal_state)))
    dx, ddt, dB, dC = (
        sizes.untokens(g).astype(z.dtype) for g, z in zip(gradients, (x, dt, B, C), strict=True)
    )
    dA = sizes.unstates(dA).sum(0)
    return dx, ddt, dA.astype(A.dtype), dB, dC, sizes.unstates(c), None


BACKEND = Backend(forward, backward, prepare)
