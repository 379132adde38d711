"""The public op: signature, validation, dispatch."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels.checkpoint_attention import gpu, reference, tile, tpu, xla
from pallas_kernels.checkpoint_attention.slots import Config
from pallas_kernels.common import dispatch, segments, validate
from pallas_kernels.common.backend import Op, call_op

_OP = "checkpoint_attention"
OP = Op(
    _OP,
    {
        "reference": reference.BACKEND,
        "xla": xla.BACKEND,
        "tpu": tpu.BACKEND,
        "gpu": gpu.BACKEND,
    },
    one_token=xla.one_token,
    outputs=("", "_lse"),
)


@overload
def checkpoint_attention(
    q: Float[ArrayLike, "b l h k"],
    k: Float[ArrayLike, "b l g k"] | None,
    v: Float[ArrayLike, "b l g v"] | None,
    *,
    interval: int,
    scale: float | None = None,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    offset: Int[ArrayLike, " b"] | None = None,
    past_k: Float[ArrayLike, "b p g k"] | None = None,
    past_v: Float[ArrayLike, "b p g v"] | None = None,
    past_length: Int[ArrayLike, " b"] | None = None,
    return_lse: Literal[False] = False,
    implementation: dispatch.Implementation = None,
) -> Float[Array, "b l h v"]: ...


@overload
def checkpoint_attention(
    q: Float[ArrayLike, "b l h k"],
    k: Float[ArrayLike, "b l g k"] | None,
    v: Float[ArrayLike, "b l g v"] | None,
    *,
    interval: int,
    scale: float | None = None,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    offset: Int[ArrayLike, " b"] | None = None,
    past_k: Float[ArrayLike, "b p g k"] | None = None,
    past_v: Float[ArrayLike, "b p g v"] | None = None,
    past_length: Int[ArrayLike, " b"] | None = None,
    return_lse: Literal[True],
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "b l h v"], Float[Array, "b l h"]]: ...


def checkpoint_attention(
    q: Float[ArrayLike, "b l h k"],
    k: Float[ArrayLike, "b l g k"] | None,
    v: Float[ArrayLike, "b l g v"] | None,
    *,
    interval: int,
    scale: float | None = None,
    segment_ids: Int[ArrayLike, "b l"] | None = None,
    offset: Int[ArrayLike, " b"] | None = None,
    past_k: Float[ArrayLike, "b p g k"] | None = None,
    past_v: Float[ArrayLike, "b p g v"] | None = None,
    past_length: Int[ArrayLike, " b"] | None = None,
    return_lse: bool = False,
    implementation: dispatch.Implementation = None,
) -> Any:
    """Softmax attention of each token to itself and to every `interval`-th token of its past.

        o_t = sum_s softmax_s(scale * q_t k_s) v_s    over s = t and the checkpoints before t

    Checkpoints are the positions `interval - 1, 2 * interval - 1, ...` of a document. A token that
    is one counts itself once. Over keys and values smoothed by a gated recurrence that restarts
    after each checkpoint this is RAT (Wei et al. 2025); over those of a locally mixed stream, SCOUT
    (Jafari et al. 2025).

    Args:
      q: queries `(B, L, H, K)`, float32 or bfloat16.
      k, v: keys `(B, L, G, K)` and values `(B, L, G, V)`, `q`'s dtype. Head h reads group
        `h // (H / G)`; G divides H; K and V up to 256. Both None: the tokens see `past_*` alone,
        for a part that is `merge`d.
      interval: at least 1; 1 is causal softmax attention.
      scale: factor on the scores; `K**-0.5` if None.
      segment_ids: `(B, L)` int32, the document of each token; 0 is padding and stands only at the
        end of a row. A token sees its own document only, positions count from its start; the
        output of padding is 0.
      offset: `(B,)` int32, the position of token 0 in its document; zeros if None.
      past_k, past_v: `(B, P, G, K)` and `(B, P, G, V)`, checkpoints of earlier calls, for the first
        document of each row; together with `offset`, unless k and v are None.
      past_length: `(B,)` int32, how many of them are valid; P if None.
      return_lse: also return the logarithm of the sum of the exponentials of a token's scores.
      implementation: None, or a name or a sequence of names of `"reference" | "xla" | "tpu" |
        "gpu"`; see `dispatch.run`. `reference` and `xla` take and keep float64 too.

    Returns:
      `o (B, L, H, V)` in `q`'s dtype; with `return_lse` also `lse (B, L, H)`, float32. A token that
      sees nothing, such as padding, has an output of 0 and an `lse` of -inf.

    Matmuls take operands of `q`'s dtype and sum in float32; scores and softmax are float32.
    Gradients flow through every array of floats and both outputs. Forward mode and second
    derivatives: `implementation="reference"`.

    Raises:
      ValueError: a shape, dtype or value that does not fit; the message names the argument. Values
        are looked at in arrays on the host or the CPU backend; in traced arrays and on accelerators
        by `checked`.
      NotImplementedError: a forced implementation cannot serve the arguments.
    """
    queries = jnp.asarray(q)
    others = [None if x is None else jnp.asarray(x) for x in (k, v, past_k, past_v)]
    _validate((queries, *others), interval, segment_ids, offset, past_length)
    segment_index = None if segment_ids is None else segments.index(jnp.asarray(segment_ids))
    integers = (None if x is None else jnp.asarray(x) for x in (past_length, offset))
    o, lse = call_op(
        OP,
        Config(float(queries.shape[3] ** -0.5 if scale is None else scale), int(interval)),
        *(queries, *others, *integers, segment_index),
        length=queries.shape[1],
        implementation=implementation,
    )
    return (o, tile.or_infinity(lse)) if return_lse else o


def _validate(arrays, interval, segment_ids, offset, past_length) -> None:
    q, k, v, past_k, past_v = arrays
    if not isinstance(interval, int | np.integer) or isinstance(interval, bool) or interval < 1:
        raise ValueError(f"{_OP}: interval must be an integer, at least 1, got {interval!r}")
    validate.shape(_OP, "q", q, "(B, L, H, K)", (None,) * 4)
    validate.dtype(_OP, "q", q, ("float32", "bfloat16", "float64"))
    batch, length, _, _ = q.shape
    _validate_pair(q, k, v, ("k", "v"), "L", length)
    _validate_pair(q, past_k, past_v, ("past_k", "past_v"), "P", None)
    if k is None and past_k is None:
        raise ValueError(f"{_OP}: k and v may be None only with past_k and past_v, got neither")
    if k is not None and past_k is not None:
        sizes = (batch, None, k.shape[2], k.shape[3])
        validate.shape(_OP, "past_k", past_k, "(B, P, G, K) as k has them", sizes)
        validate.shape(
            _OP, "past_v", past_v, "(B, P, G, V) as v has them", (*sizes[:3], v.shape[3])
        )
        if offset is None:
            raise ValueError(
                f"{_OP}: past_k needs offset, the position of token 0 in the document that past_k "
                "begins, got offset=None"
            )
    if k is None and offset is not None:
        raise ValueError(f"{_OP}: offset has no meaning where k and v are None; leave it out")
    if past_k is None and past_length is not None:
        raise ValueError(f"{_OP}: past_length needs past_k and past_v, got past_k=None")
    held = None if past_k is None else past_k.shape[1]
    _validate_counts("offset", offset, batch, None)
    _validate_counts("past_length", past_length, batch, held)
    if segment_ids is not None:
        validate.segment_ids(_OP, segment_ids, batch, length)


def _validate_pair(q, k, v, names, axis: str, length: int | None) -> None:
    """Keys and values, either both or neither."""
    if (k is None) != (v is None):
        given, absent = names if v is None else names[::-1]
        raise ValueError(f"{_OP}: {given} needs {absent}, got {absent}=None")
    if k is None:
        return
    batch, _, heads, key_size = q.shape
    validate.shape(_OP, names[0], k, f"(B, {axis}, G, K)", (batch, length, None, key_size))
    groups = k.shape[2]
    validate.shape(_OP, names[1], v, f"(B, {axis}, G, V)", (batch, k.shape[1], groups, None))
    for name, x in zip(("q", *names), (q, k, v), strict=True):
        if x.size == 0:
            raise ValueError(f"{_OP}: {name} must not be empty, got shape {x.shape}")
        validate.dtype(_OP, name, x, (q.dtype.name,), because=f"q is {q.dtype}")
    if heads % groups:
        raise ValueError(
            f"{_OP}: G must divide H, got {names[0]} with G = {groups} and q with H = {heads}; "
            "repeat keys and values, or choose another number of groups"
        )
    if max(key_size, v.shape[3]) > 256:
        raise ValueError(f"{_OP}: K and V go up to 256, got K = {key_size} and V = {v.shape[3]}")


def _validate_counts(name: str, x, batch: int, most: int | None) -> None:
    """`(B,)` int32, at least 0, and at most `most`, where the values are known."""
    if x is None:
        return
    validate.shape(_OP, name, x, "(B,)", (batch,))
    validate.dtype(_OP, name, x, ("int32",))
    if (values := validate.values(x)) is None:
        return
    if (values < 0).any() or (most is not None and (values > most).any()):
        bound = "" if most is None else f" and at most P = {most}"
        raise ValueError(f"{_OP}: {name} must be at least 0{bound}, got {values.tolist()}")
