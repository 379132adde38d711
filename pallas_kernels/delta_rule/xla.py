"""The portable path: a loop over chunks of time, every step the maths of `tile` for some rows.

A step takes all heads of a few rows through one chunk; how many rows is set so that a step is large
enough to hide the loop and small enough for a CPU's cache, whatever the batch. Forward keeps the
state that enters every chunk; backward walks the chunks from the last to the first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import compat, symbolic
from pallas_kernels.common.backend import Backend
from pallas_kernels.delta_rule import tile
from pallas_kernels.matrix_state import decay_sums, decode, masks
from pallas_kernels.matrix_state.config import Config

# Measured on x86 with 64 and 128 keys and values: chunks of 64 tokens are slower than those of 32,
# by a tenth on two cores and by half on one; 16 are no faster. 4 and 8 heads a step are alike.
_CHUNK = 32
_HEADS_A_STEP = 8


def one_token(config: Config, q, k, v, beta, log_decay, initial_state, segment_index):
    """A decoding step; see `decode.one_token`."""

    def new_value(k, v, state):
        error = v - decode.read(k, state)
        return beta[:, 0].astype(state.dtype)[..., None] * error

    return decode.one_token(config, q, k, v, log_decay, initial_state, segment_index, new_value)


# How arguments are cut. Heads are (G, R): R read the same queries and keys.


class _Tokens(NamedTuple):
    """Arguments by token; in the loop, one chunk of a few rows, `(rows, C, ...)`."""

    q: Any  # (..., G, K)
    k: Any  # (..., G, K)
    v: Any  # (..., G, R, V)
    beta: Any  # (..., G, R)
    g: Any  # (..., G, R, 1 or K), or None
    segment_index: Any  # (...), or None


class _Cut(NamedTuple):
    """`blocks` of `rows` rows, `steps` chunks of `size` tokens; zeros are added to fill them."""

    batch: int
    length: int
    blocks: int
    rows: int
    steps: int
    size: int

    def tokens(self, x):
        """`(B, L, ...) -> (blocks, steps, rows, C, ...)`."""
        x = self.fill_rows(x)
        fill = self.steps * self.size - self.length
        x = jnp.pad(x, ((0, 0), (0, fill)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(self.blocks, self.rows, self.steps, self.size, *x.shape[2:])
        return jnp.moveaxis(x, 2, 1)

    def untokens(self, x, like):
        """The inverse of `tokens`, for an array of `like`'s shape and dtype."""
        x = jnp.moveaxis(x, 1, 2)
        x = x.reshape(self.blocks * self.rows, self.steps * self.size, *like.shape[2:])
        return x[: self.batch, : self.length].astype(like.dtype)

    def fill_rows(self, x):
        fill = self.blocks * self.rows - self.batch
        return jnp.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1))

    def states(self, state, groups: int):
        """`(B, H, K, V) -> (blocks, rows, G, R, V, K)`."""
        state = jnp.swapaxes(self.fill_rows(state), 2, 3)
        return state.reshape(self.blocks, self.rows, groups, -1, *state.shape[2:])

    def unstates(self, state):
        """The inverse of `states`."""
        state = state.reshape(self.blocks * self.rows, -1, *state.shape[4:])[: self.batch]
        return jnp.swapaxes(state, 2, 3)


def cut(config: Config, batch: int, length: int, heads: int) -> _Cut:
    """How rows are cut."""
    size = min(config.chunk or _CHUNK, 1 << (length - 1).bit_length())
    blocks = symbolic.known(-(-batch // max(1, _HEADS_A_STEP // heads)), 1)
    return _Cut(batch, length, blocks, -(-batch // blocks), -(-length // size), size)


def _arguments(config: Config, q, k, v, beta, log_decay, segment_index):
    """`(sizes, _Tokens, entering segment_index (blocks, steps, rows) or None)`."""
    batch, length, heads, _ = v.shape
    sizes = cut(config, batch, length, heads)
    grouped = (q.shape[2], heads // q.shape[2])
    if log_decay is not None:
        width = log_decay.shape[3:] or (1,)
        log_decay = log_decay.reshape(batch, length, *grouped, *width)
    v = v.reshape(batch, length, *grouped, v.shape[3])
    beta = beta.reshape(batch, length, *grouped)
    tokens = jax.tree.map(sizes.tokens, _Tokens(q, k, v, beta, log_decay, segment_index))
    entering = None
    if segment_index is not None:
        segment_index = jnp.moveaxis(tokens.segment_index, 1, 2).reshape(
            sizes.blocks * sizes.rows, -1
        )
        entering = masks.entering_segment(segment_index, sizes.size)
        entering = jnp.moveaxis(entering.reshape(sizes.blocks, sizes.rows, -1), 2, 1)
    return sizes, tokens, entering


# One step of the loop.


def _every_head(fn, tokens: _Tokens, entering, dtype, *more):
    """`fn(q, k, v, gates, docs, *more)` of every head; `more` begins with (rows, G, R)."""
    wide = tokens._replace(segment_index=None)
    q, k, v, beta, g, _ = jax.tree.map(lambda x: x.astype(dtype), wide)

    def head(q, k, v, beta, g, docs, *more):
        gates = tile.gates(beta[:, None], g, docs, decay_sums.BY_HALVES)
        return fn(q, k, v, gates, docs, *more)

    def row(q, k, v, beta, g, segment_index, entering, *more):
        docs = None
        if segment_index is not None:
            docs = masks.segment_masks(
                segment_index[:, None], segment_index[None], entering[None, None]
            )
        decays = None if g is None else 1
        inner = jax.vmap(head, in_axes=(None, None, 1, 1, decays, None, *[0] * len(more)))
        outer = jax.vmap(inner, in_axes=(1, 1, 1, 1, decays, None, *[0] * len(more)))
        return outer(q, k, v, beta, g, docs, *more)

    return jax.vmap(row)(q, k, v, beta, g, tokens.segment_index, entering, *more)


def _forward_step(config: Config, tokens: _Tokens, entering, state):
    """`(o (rows, C, G, R, V), state')`."""

    def head(q, k, v, gates, docs, state):
        return tile.forward(q, k, v, gates, docs, state, config.scale)

    o, after = _every_head(head, tokens, entering, state.dtype, state)
    return jnp.moveaxis(o, 3, 1).astype(tokens.v.dtype), after


def _backward_step(config: Config, tokens: _Tokens, entering, state, do, dstate):
    """`(gradients of the tokens, dstate)`."""

    def head(q, k, v, gates, docs, state, do, dstate):
        summation = decay_sums.BY_HALVES
        return tile.backward(q, k, v, gates, docs, state, do, dstate, config.scale, summation)

    do = jnp.moveaxis(do, 1, 3).astype(state.dtype)
    d = _every_head(head, tokens, entering, state.dtype, state, do, dstate)
    dq, dk = (jnp.moveaxis(x.sum(2), 2, 1) for x in (d.dq, d.dk))
    dv, dbeta, dg = (
        None if x is None else jnp.moveaxis(x, 3, 1) for x in (d.dv, d.dbeta[..., 0], d.dg)
    )
    gradients = _Tokens(dq, dk, dv, dbeta, dg, None)
    narrow = jax.tree.map(
        lambda x, like: x.astype(like.dtype), gradients, tokens._replace(segment_index=None)
    )
    return narrow, d.dstate


# The loops.


def _loop(body, carry, inputs, *, reverse: bool):
    """`jax.lax.scan` whose carry is typed, under `jax.shard_map`, as what it will become."""
    like = jax.tree.leaves(inputs)[0]
    return jax.lax.scan(body, compat.match_vma(carry, like)[0], inputs, reverse=reverse)


def _every_block(body, inputs):
    """`jax.lax.map`, without a loop around a single block of rows."""
    if jax.tree.leaves(inputs)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], body(jax.tree.map(lambda x: x[0], inputs)))
    return jax.lax.map(body, inputs)


def forward(
    config: Config,
    q,
    k,
    v,
    beta,
    log_decay,
    initial_state,
    segment_index,
    *,
    return_residuals: bool,
):
    """`((o, final_state), residuals)`: the arguments and the state that enters every chunk."""
    sizes, tokens, entering = _arguments(config, q, k, v, beta, log_decay, segment_index)

    def step(state, chunk):
        tokens, entering = chunk
        o, after = _forward_step(config, tokens, entering, state)
        return after, (o, state)

    def block(inputs):
        tokens, entering, first = inputs
        return _loop(step, first, (tokens, entering), reverse=False)

    first = sizes.states(initial_state, q.shape[2])
    last, (o, states) = _every_block(block, (tokens, entering, first))
    outputs = sizes.untokens(o, v), sizes.unstates(last)
    if not return_residuals:
        return outputs, None
    return outputs, (q, k, v, beta, log_decay, segment_index, states)


def backward(config: Config, residuals, cotangents):
    """Gradients of `delta_rule`'s arrays from those of `(o, final_state)`."""
    *arrays, states = residuals
    q, k, v, beta, log_decay, _ = arrays
    do, dfinal = cotangents
    sizes, tokens, entering = _arguments(config, *arrays)

    def step(dstate, chunk):
        tokens, entering, state, do = chunk
        gradients, dstate = _backward_step(config, tokens, entering, state, do, dstate)
        return dstate, gradients

    def block(inputs):
        *chunk, last = inputs
        return _loop(step, last, tuple(chunk), reverse=True)

    do = sizes.tokens(do.reshape(*do.shape[:2], *tokens.v.shape[4:]))
    last = sizes.states(dfinal, q.shape[2])
    first, d = _every_block(block, (tokens, entering, states, do, last))
    given = {"q": q, "k": k, "v": v, "beta": beta, "g": log_decay}
    dq, dk, dv, dbeta, dg = (
        None if like is None else sizes.untokens(getattr(d, name), like)
        for name, like in given.items()
    )
    return dq, dk, dv, dbeta, dg, sizes.unstates(first), None


BACKEND = Backend(forward, backward)
