"""Which tokens are checkpoints, and which checkpoints a token sees.

The checkpoints of a row, those of earlier calls first and then its own in the order of their
tokens, are its slots. What a token sees besides itself are consecutive slots: those of its document
that lie before it. Everything here is integers and a gather, which JAX differentiates; the maths of
the implementations knows only slots.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import dispatch, segments


class Config(NamedTuple):
    """What is static about a call.

    Attributes:
      scale: factor on the scores.
      interval: every how many tokens there is a checkpoint.
      tiles: (tokens, checkpoints) met at once by `xla`, `tpu.Limits`, `gpu.Tiles`; None for what
        suits the backend.
    """

    scale: float
    interval: int
    tiles: Any = None


class Slots(NamedTuple):
    """The checkpoints of each row.

    Attributes:
      k, v: `(B, M, G, K)` and `(B, M, G, V)`, M >= 1.
      first, last: `(B, L)` int32; a token sees the slots from `first` up to but without `last`,
        and itself unless `last` is -1, which is padding. Both None: the row is one document from
        its start, so that token t sees the slots below `t // interval`.
    """

    k: Any
    v: Any
    first: Any
    last: Any


def slots(config: Config, like, k, v, past_k, past_v, past_length, offset, segment_index) -> Slots:
    """The slots of arguments as `reference.checkpoint_attention` takes them; `like` is q."""
    unsupported = {}
    if k is None:
        unsupported["strided"] = "there are past checkpoints alone"
    elif segment_index is not None:
        unsupported["strided"] = "documents begin anywhere"
    elif offset is not None:  # always beside past checkpoints
        unsupported["strided"] = "the row goes on with a document"
    return dispatch.choose(
        "checkpoint_attention slots",
        {
            "gathered": functools.partial(_gathered, config, like),
            "strided": functools.partial(_strided, config, like),
        },
        *(k, v, past_k, past_v, past_length, offset, segment_index),
        default="gathered",
        everywhere="strided",
        unsupported=unsupported,
    )


def _strided(config: Config, like, k, v, *_) -> Slots:
    """Every n-th token of rows of one document each from its start."""
    count = (like.shape[1] - 1) // config.interval
    slot_k, slot_v = (_every(x, count, config.interval) for x in (k, v))
    return Slots(slot_k, slot_v, None, None)


def _gathered(config: Config, like, k, v, past_k, past_v, past_length, offset, segment_index):
    batch, length = like.shape[:2]
    if k is None:
        valid = _valid(past_k, past_length, batch)
        see = jnp.ones((batch, length), bool) if segment_index is None else segment_index == 1
        last = jnp.where(see, valid[:, None], 0)
        if segment_index is not None:
            last = jnp.where(segment_index == 0, -1, last)
        return Slots(past_k, past_v, jnp.zeros_like(last), last)
    token, first, last, own = _own(config, batch, length, offset, segment_index)
    valid = _valid(past_k, past_length, batch)
    first = jnp.where(own, 0, valid[:, None] + first)
    last = valid[:, None] + last
    if segment_index is not None:
        first, last = (
            jnp.where(segment_index == 0, 0, first),
            jnp.where(segment_index == 0, -1, last),
        )

    def gather(x, past):
        count = token.shape[1]
        if past is None:
            return _take(x, token) if count else x[:, :1]
        if not count:
            return past
        if past_length is None:
            return jnp.concatenate([past, _take(x, token)], 1)
        slot = jnp.arange(past.shape[1] + count, dtype=jnp.int32)[None]
        both = jnp.concatenate([past, _take(x, token)], 1)
        behind = past.shape[1] + slot - valid[:, None]
        return _take(both, jnp.where(slot < valid[:, None], slot, behind))

    return Slots(gather(k, past_k), gather(v, past_v), first, last)


def _valid(past_k, past_length, batch: int):
    if past_length is not None:
        return past_length
    return jnp.full(batch, 0 if past_k is None else past_k.shape[1], jnp.int32)


def _every(x, count: int, interval: int):
    """Tokens interval - 1, 2 interval - 1, ...; one of zeros if there is none."""
    if count == 0:
        return jnp.zeros_like(x[:, :1])
    rows = x[:, : count * interval].reshape(x.shape[0], count, interval, *x.shape[2:])
    return rows[:, :, interval - 1]


def _take(x, index):
    """Rows of `x (B, N, ...)` at `index (B, M)`, the last one for what lies behind."""
    index = jnp.minimum(index, x.shape[1] - 1)
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, index)


def _own(config: Config, batch: int, length: int, offset, segment_index):
    """Places and counts of the checkpoints among a row's own tokens.

    Returns:
      token: `(B, M)`, where they are, L behind the last.
      first, last: `(B, L)`, how many of them lie before the token's document, and before it.
      begun: `(B, L)` bool, the token's document is the first of the row.
    """
    one = jnp.ones((batch, length), jnp.int32)
    position = segments.positions(one if segment_index is None else segment_index)
    begun = one > 0 if segment_index is None else segment_index == 1
    if offset is not None:
        position = position + jnp.where(begun, offset[:, None], 0)
    marked = (position + 1) % config.interval == 0
    if segment_index is not None:
        marked = marked & (segment_index > 0)
    marked_so_far = jnp.cumsum(marked, axis=1, dtype=jnp.int32)
    last = marked_so_far - marked.astype(jnp.int32)
    first = jnp.zeros_like(last)
    if segment_index is not None:
        first = jax.lax.cummax(jnp.where(segments.starts(segment_index), last, 0), axis=1)
    # What the last token of a row adds is seen by none of it.
    begun_already = 0 if offset is None else config.interval - 1
    most = (length - 1 + begun_already) // config.interval
    at = jnp.arange(length, dtype=jnp.int32)[None]
    return jnp.sort(jnp.where(marked, at, length), axis=1)[:, :most], first, last, begun
