"""The maths of softmax attention in parts, on values; shared by every backend.

A part is some keys of each query's. Its result is the pair of the output `o`, normalised over the
part's keys, and `lse`, the logarithm of the sum of their exponentials; `LOW`, with an output of 0,
where a query has no key (-inf for callers: `or_infinity`). Inside a part keys come in blocks
(online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Stands for the maximum of no scores. Finite, for a difference of infinities is no number.
LOW = -1e30


def dot(x: jax.Array, y: jax.Array, contract: str) -> jax.Array:
    """`x y` ("nn"), `x y^T` ("nt") or `x^T y` ("tn"), summed in float32 (float64 of float64).

    Scores and their gradients, which are float32, are rounded to the width of what they meet.
    """
    dtype = min(x.dtype, y.dtype, key=lambda d: jnp.finfo(d).bits)
    axes = (((0 if contract[0] == "t" else 1,), (1 if contract[1] == "t" else 0,)), ((), ()))
    return jax.lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        axes,
        precision=jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float64 if dtype == jnp.float64 else jnp.float32,
    )


def visible(slot: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Which checkpoints a token sees: those from `first` up to but without `last`."""
    return (slot >= first) & (slot < last)


def block(
    maximum: jax.Array, total: jax.Array, scores: jax.Array, mask: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One block of keys of an online softmax.

    Args:
      maximum, total: so far, of the scores and of `exp(scores - maximum)`; 1 long in `axis`.
      scores: of the block, keys along `axis`.
      mask: which of them there are.

    Returns:
      The new maximum and total, the factor on what was summed before, and the block's
      exponentials.
    """
    scores = jnp.where(mask, scores, LOW)
    new = jnp.maximum(maximum, jnp.max(scores, axis=axis, keepdims=True))
    # Where there was no key yet `new` is LOW too, and the exponentials have to be 0 all the same.
    p = jnp.exp(scores - jnp.maximum(new, LOW / 2))
    factor = jnp.exp(maximum - new)
    return new, factor * total + jnp.sum(p, axis=axis, keepdims=True), factor, p


def inverse(total: jax.Array) -> jax.Array:
    """`1 / total`, 1 where there are no keys."""
    return 1.0 / jnp.where(total > 0, total, 1.0)


def log_sum_exp(maximum: jax.Array, total: jax.Array) -> jax.Array:
    """The logarithm of the sum of all exponentials; LOW where there are no keys."""
    return jnp.where(total > 0, maximum + jnp.log(jnp.where(total > 0, total, 1.0)), LOW)


def or_infinity(lse: jax.Array) -> jax.Array:
    """`lse` with the logarithm of 0, which is -inf, where there are no keys."""
    return jnp.where(lse > LOW / 2, lse, -jnp.inf)


def probabilities(scores: jax.Array, mask: jax.Array, lse: jax.Array) -> jax.Array:
    """`exp(scores - lse)`, 0 outside of the mask."""
    return jnp.exp(jnp.where(mask, scores - lse, LOW))


def score_gradient(p: jax.Array, mask: jax.Array, dp: jax.Array, delta: jax.Array) -> jax.Array:
    """The cotangent of scores from that of their probabilities.

    Args:
      delta: `sum(do * o) - dlse` of each query.
    """
    return p * jnp.where(mask, dp - delta, 0.0)


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over all keys from its results over parts of them.

    Args:
      parts: pairs of `o (B, L, H, V)` and `lse (B, L, H)`, as `checkpoint_attention` returns them
        with `return_lse=True`. No key may be in two parts. A part without keys has an `lse` of
        -inf.

    Returns:
      `o (B, L, H, V)` in the parts' dtype and `lse (B, L, H)`; 0 and -inf where all parts are
      without keys. Differentiable in every array.

    Raises:
      ValueError: no parts, or arrays that do not fit.
    """
    if not parts:
        raise ValueError("merge: parts must not be empty")
    for o, lse in parts:
        if o.shape != parts[0][0].shape or lse.shape != o.shape[:-1]:
            raise ValueError(
                f"merge: parts must be pairs of o (B, L, H, V) = {parts[0][0].shape} and lse "
                f"(B, L, H), got {o.shape} and {lse.shape}"
            )
        if o.dtype != parts[0][0].dtype or lse.dtype != parts[0][1].dtype:
            raise ValueError(
                f"merge: parts must have the same dtypes, got {parts[0][0].dtype} and "
                f"{parts[0][1].dtype}, then {o.dtype} and {lse.dtype}"
            )
    highest = jax.lax.stop_gradient(jnp.stack([lse for _, lse in parts]).max(0))
    highest = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = [jnp.exp(lse - highest) for _, lse in parts]
    total = sum(weights[1:], weights[0])
    weighted = [w[..., None] * o.astype(w.dtype) for w, (o, _) in zip(weights, parts, strict=True)]
    o = sum(weighted[1:], weighted[0]) * inverse(total)[..., None]
    return o.astype(parts[0][0].dtype), or_infinity(log_sum_exp(highest, total))
