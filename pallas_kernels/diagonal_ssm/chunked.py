"""Chunks of tokens as matrix products, the state carried from chunk to chunk.

Per channel: `Y = U toeplitz + S read` and `F = U write` with a chunk a row; only `S' = a^T S + F`
goes from chunk to chunk. The work per token is T + 4N multiplications, whatever the length.
Matrices are `tile.chunk`'s; all is differentiated by JAX but the two loops.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.compat import match_vma as vary
from pallas_kernels.diagonal_ssm import tile
from pallas_kernels.diagonal_ssm.powers import powers


def chunk_size(length: int) -> int:
    """Tokens a chunk: the fastest of 32, 64 and 128 on x86, shorter for a short row."""
    return min(64, length)


class Cut(NamedTuple):
    """Rows cut into chunks of T tokens, zeros behind: `(B, C, T, H)`."""

    tokens: jax.Array
    length: int

    @property
    def steps(self) -> int:
        return self.tokens.shape[2]

    @property
    def rows(self) -> jax.Array:
        """`(H, B, C, T)`: what is multiplied by a channel's matrices."""
        return jnp.moveaxis(self.tokens, 3, 0)

    def uncut(self, rows: jax.Array) -> jax.Array:
        """`(H, B, C, T) -> (B, L, H)`."""
        y = jnp.moveaxis(rows, 0, 3)
        return y.reshape(y.shape[0], -1, y.shape[3])[:, : self.length]


def cut(u: jax.Array, dtype, steps: int) -> Cut:
    batch, length, width = u.shape
    count = -(-length // steps)
    u = jnp.pad(u.astype(dtype), ((0, 0), (0, count * steps - length), (0, 0)))
    return Cut(u.reshape(batch, count, steps, width), length)


class Documents(NamedTuple):
    """Which document each token of each chunk belongs to, as masks; `(B, C, T)` or `(B, C)`.

    Attributes:
      place: which of its chunk's documents a token is in, from 0; -1 on padding.
      first: the token is in the document that the entering state comes from.
      last: the token is in the last document of its chunk, whose state leaves.
      keep: first and last are one document: the state goes through.
      lengths: real tokens of each row, `(B,)`.
    """

    place: jax.Array
    first: jax.Array
    last: jax.Array
    keep: jax.Array
    lengths: jax.Array


def documents(segment_index: jax.Array, steps: int) -> Documents:
    """From run numbers `(B, L)`."""
    batch, length = segment_index.shape
    count = -(-length // steps)
    segment_index = jnp.pad(segment_index, ((0, 0), (0, count * steps - length))).reshape(
        batch, count, steps
    )
    real: jax.Array = segment_index != 0
    # What enters the first chunk belongs to the row's first document.
    before = jnp.concatenate([segment_index[:, :1, 0], segment_index[:, :-1, -1]], axis=1)
    end = segment_index.max(-1)
    return Documents(
        place=jnp.where(real, segment_index - segment_index[..., :1], -1),
        first=real & (segment_index == before[..., None]),
        last=real & (segment_index == end[..., None]),
        keep=end == before,
        lengths=real.sum((1, 2), dtype=jnp.int32),
    )


def diagonal_ssm(u, log_a, c, initial_state, segment_index):
    """`(y, final_state)` from the first token to the last; arguments as in `reference`."""
    matrices = tile.chunk(log_a, c, chunk_size(u.shape[1]))
    pieces = cut(u, log_a.real.dtype, chunk_size(u.shape[1]))
    inside = None if segment_index is None else documents(segment_index, pieces.steps)
    states = entering_states(pieces, matrices, initial_state, inside)
    carried = dot("hbcn,hnt->hbct", states, matrices.read)
    if inside is None:
        y = dot("hbct,hts->hbcs", pieces.rows, matrices.toeplitz) + carried
    else:
        y = _per_document(pieces.rows, matrices.toeplitz, inside.place)
        y = y + only(inside.first, carried)
    final = final_state(pieces, log_a, matrices, states, initial_state, inside)
    return pieces.uncut(y).astype(u.dtype), final


def dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, precision=tile.HIGHEST)


def only(mask: jax.Array, x: jax.Array) -> jax.Array:
    """`x (H, ...)` where `mask (...)`; a select, so that nothing else gets through."""
    return jnp.where(mask[None], x, jnp.zeros_like(x))


def entering_states(pieces: Cut, matrices: tile.Chunk, initial_state, inside) -> jax.Array:
    """The state before each chunk, planes `(H, B, C, 2N)`."""
    rows = pieces.rows if inside is None else only(inside.last, pieces.rows)
    flow = dot("hbct,htn->hbcn", rows, matrices.write)
    initial = tile.to_planes(jnp.moveaxis(initial_state, 1, 0))
    keep = None if inside is None else inside.keep
    decay, lacking = map(tile.to_planes, (matrices.decay, matrices.lacking))
    return _chain(decay, lacking, flow, initial, keep)


def final_state(pieces: Cut, log_a, matrices: tile.Chunk, states, initial_state, inside):
    """The state after each row's last real token, complex `(B, H, N)`."""
    if inside is None:
        size = (pieces.length - 1) % pieces.steps + 1
        tokens = pieces.tokens[:, -1, :size]
        write = matrices.write[:, pieces.steps - size :]
        decay = powers(log_a, jnp.full((1, 1), size, jnp.int32))[None]
        before = tile.to_complex(jnp.moveaxis(states[:, :, -1], 0, 1))
        return decay * before + tile.to_complex(dot("bth,htn->bhn", tokens, write))
    last = jnp.maximum(inside.lengths - 1, 0)
    row, place = last // pieces.steps, last % pieces.steps
    # Moved so that the last real token is the last of its chunk, and zeros before.
    source = jnp.arange(pieces.steps, dtype=jnp.int32)[None] - (pieces.steps - 1 - place)[:, None]
    tokens, mine, keep, before = (
        jnp.take_along_axis(x, row.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]
        for x in (pieces.tokens, inside.last, inside.keep, jnp.moveaxis(states, 0, 2))
    )
    index = source % pieces.steps
    tokens = jnp.take_along_axis(tokens, index[..., None], axis=1)
    mine = (source >= 0) & jnp.take_along_axis(mine, index, axis=1)
    tokens = jnp.where(mine[..., None], tokens, jnp.zeros_like(tokens))
    carried = powers(log_a[None], (place + 1)[:, None, None]) * tile.to_complex(before)
    carried = jnp.where(keep[:, None, None], carried, jnp.zeros_like(carried))
    final = carried + tile.to_complex(dot("bth,htn->bhn", tokens, matrices.write))
    return jnp.where((inside.lengths > 0)[:, None, None], final, initial_state)


# The two loops, with derivatives by hand.


def _multiply(a, h):
    """`a h` of planes `(.., 2N)`."""
    ar, ai = jnp.split(a, 2, axis=-1)
    hr, hi = jnp.split(h, 2, axis=-1)
    return jnp.concatenate([ar * hr - ai * hi, ar * hi + ai * hr], axis=-1)


def _conjugate(a):
    real, imaginary = jnp.split(a, 2, axis=-1)
    return jnp.concatenate([real, -imaginary], axis=-1)


def _at(x, i):
    return jax.lax.dynamic_index_in_dim(x, i, 2, keepdims=False)


def _put(x, value, i):
    return jax.lax.dynamic_update_index_in_dim(x, value, i, 2)


def _kept(keep, x, i):
    """`x (H, B, 2N)` of the rows whose state goes through chunk i."""
    if keep is None:
        return x
    mask = jax.lax.dynamic_index_in_dim(keep, i, 1)
    return jnp.where(mask[None], x, jnp.zeros_like(x))


@jax.custom_vjp
def _chain(decay, lacking, flow, initial, keep):
    """States before each chunk, `(H, B, C, 2N)`: `S_{i+1} = (decay + lacking) S_i + flow_i`, S_i
    dropped where a document begins. `decay, lacking (H, 2N)`, `initial (H, B, 2N)`, `keep (B, C)`.
    """

    def body(i, carry):
        state, states = carry
        states = _put(states, state, i)
        added = _kept(keep, _multiply(lacking[:, None], state), i) + _at(flow, i)
        return _kept(keep, _multiply(decay[:, None], state), i) + added, states

    initial, out = vary(initial, jnp.zeros_like(flow))
    return jax.lax.fori_loop(0, flow.shape[2], body, (initial, out))[1]


def _chain_forward(decay, lacking, flow, initial, keep):
    states = _chain(decay, lacking, flow, initial, keep)
    return states, (decay, lacking, states, keep)


def _chain_backward(residuals, dstates):
    decay, lacking, states, keep = residuals
    back, more = _conjugate(decay)[:, None], _conjugate(lacking)[:, None]
    count = states.shape[2]

    def body(k, carry):
        gradient, ddecay, dflow = carry
        i = count - 1 - k
        dflow = _put(dflow, gradient, i)
        through = _kept(keep, gradient, i)
        ddecay = ddecay + _multiply(_conjugate(_at(states, i)), through)
        added = _kept(keep, _multiply(more, gradient), i) + _at(dstates, i)
        return _kept(keep, _multiply(back, gradient), i) + added, ddecay, dflow

    zero = jnp.zeros_like(states[:, :, 0])
    carry = jax.lax.fori_loop(0, count, body, vary(zero, zero, jnp.zeros_like(states)))
    dinitial, ddecay, dflow = carry
    # All of the derivative goes through the nearest decay; that of the rest is 1e-8 of it.
    return ddecay.sum(1), None, dflow, dinitial, None


_chain.defvjp(_chain_forward, _chain_backward)


@jax.custom_vjp
def _per_document(rows, toeplitz, place):
    """`rows toeplitz` with no path between documents: one product for each document of the chunk
    that has most, over what is selected of it."""

    def body(k, y):
        mine = place == k
        return jnp.where(mine[None], dot("hbct,hts->hbcs", only(mine, rows), toeplitz), y)

    return jax.lax.fori_loop(0, place.max() + 1, body, vary(jnp.zeros_like(rows), rows)[0])


def _documents_forward(rows, toeplitz, place):
    return _per_document(rows, toeplitz, place), (rows, toeplitz, place)


def _documents_backward(residuals, dy):
    rows, toeplitz, place = residuals

    def body(k, dtoeplitz):
        mine = place == k
        return dtoeplitz + dot("hbct,hbcs->hts", only(mine, rows), only(mine, dy))

    drows = _per_document(dy, toeplitz.swapaxes(1, 2), place)
    zero = vary(jnp.zeros_like(toeplitz), rows, dy)[0]
    dtoeplitz = jax.lax.fori_loop(0, place.max() + 1, body, zero)
    return drows, dtoeplitz, None


_per_document.defvjp(_documents_forward, _documents_backward)
