"""Rows in chunks: backpropagation with the intermediate values of one chunk at a time.

A model of recurrent mixers goes over a row chunk by chunk and keeps the states that enter them;
backwards, it computes a chunk again from its entering state, and hands the gradient of that state
to the chunk before. The gradient is exact, with a second forward pass, in memory that grows with
the length by the states only (SeCO; Li et al., "Training Long-Context LLMs Efficiently via
Chunk-wise Optimization", 2025).

SpaCO backpropagates through some chunks only. Each is drawn by itself with probability ``share``,
and what flows back into a drawn one, from its loss and from the state that it leaves, is divided by
it: a path through p + 1 chunks is there with probability ``share^(p+1)`` and weighs the inverse, so
that the gradient is unbiased. Powers of ``share`` do not do it for a fixed number of chunks drawn
without replacement, nor does a factor on one of the two alone.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from seqmodels.parallel.mesh import split_tokens
from seqmodels.training.task import Sums

Chunk = Callable[[Any, Mapping[str, Array]], tuple[Sums, Any]]


def chunked(
    run: Chunk,
    state: Any,
    rows: Mapping[str, Array],
    *,
    chunk: int,
    drawn: Bool[Array, " n"] | None = None,
    share: float = 1.0,
) -> tuple[Sums, Any]:
    """Sums over all chunks of the rows, and the last state.

    Args:
      run: ``(state, rows of one chunk) -> (sums, state)``.
      state: that enters the rows; its leaves are ``(B, ...)``.
      rows: arrays ``(B, L)``; behind their end, chunks have zeros.
      chunk: tokens of a chunk.
      drawn: None, or which of the ``ceil(L / chunk)`` chunks gradients flow through.
      share: the probability with which each was drawn.
    """
    parts = {name: cut(x, chunk) for name, x in rows.items()}

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(carry: tuple[Sums, Any], xs: tuple[Any, Any]) -> tuple[tuple[Sums, Any], None]:
        (sums, state), (part, seen) = carry, xs
        if seen is None:
            new, state = run(state, part)
        else:
            new, state = jax.lax.cond(seen, _amplified(run, 1 / share), _constant(run), state, part)
        return (sums + new, state), None

    zero = Sums(*(jnp.zeros((), jnp.float32) for _ in range(3)))
    return jax.lax.scan(body, (zero, state), (parts, drawn))[0]


def cut(x: Array, chunk: int) -> Array:
    """``(B, L)`` as chunks ``(n, B, chunk)``, each split over the mesh as rows are."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)))
    parts = jnp.moveaxis(x.reshape(x.shape[0], -1, chunk), 1, 0)
    return split_tokens(parts, first=1)


def _constant(run: Chunk) -> Chunk:
    return lambda state, part: jax.lax.stop_gradient(run(state, part))


def _amplified(run: Chunk, factor: float) -> Chunk:
    """``run`` with what flows back into it multiplied."""
    return lambda state, part: jax.tree.map(
        lambda x: _scaled(x, factor) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        run(state, part),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scaled(x: Array, factor: float) -> Array:
    return x


def _scaled_forward(x: Array, factor: float) -> tuple[Array, None]:
    return x, None


def _scaled_backward(factor: float, _: None, dy: Array) -> tuple[Array]:
    return (dy * jnp.asarray(factor, dy.dtype),)


_scaled.defvjp(_scaled_forward, _scaled_backward)
