"""The ops that mixers and layers call: those of ``pallas_kernels``, on a mesh, for ``Segments``.

Shapes, dtypes and errors are those of the op of the same name in ``pallas_kernels``; ``segments``
stands in place of its segment ids. On a mesh every device of the data axis works on its own rows.
The compiler partitions XLA programs by itself, but not Pallas kernels: a kernel has to stand inside
`jax.shard_map`, and this module is where that is done.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Complex, Float, Inexact, Int

import pallas_kernels as kernels
from pallas_kernels.checkpoint_attention import Cache
from pallas_kernels.common.dispatch import Implementation
from seqmodels.layers.attention import SPLASH_FROM, attend
from seqmodels.segments import Segments, index_of, mask_padding


def shard_over_data(
    op: Callable[..., Any],
    replicated: Mapping[str, Any],
    sharded: Mapping[str, Any],
    *,
    check_vma: bool = True,
) -> Any:
    """``op(**replicated, **sharded)``, rows split over the data axis of the current mesh, if any.

    Args:
      op: takes arrays by name and returns arrays whose axis 0 is the batch.
      replicated: arguments that every device has in full; their gradients are summed over devices.
      sharded: arguments ``(B, ...)``, or None.
      check_vma: as in `jax.shard_map`; False for kernels that do not know of it, where nothing may
        be replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("data", 1) == 1:
        return op(**replicated, **sharded)
    rows = PartitionSpec("data")
    return jax.shard_map(
        lambda replicated, sharded: op(**replicated, **sharded),
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
        check_vma=check_vma,
    )(dict(replicated), dict(sharded))


def linear_scan(
    a: Inexact[Array, "*bl d"],
    b: Inexact[Array, "b l d"],
    *,
    initial_state: Inexact[Array, "b d"] | None = None,
    segments: Segments | None = None,
    reverse: bool = False,
    implementation: Implementation = None,
) -> tuple[Inexact[Array, "b l d"], Inexact[Array, "b d"]]:
    """``h_t = a_t h_{t-1} + b_t``, and the last ``h``; ``a`` is ``(B, L, D)`` or ``(D,)``."""
    op = functools.partial(kernels.linear_scan, reverse=reverse, implementation=implementation)
    sharded = {"b": b, "initial_state": initial_state, "segment_ids": index_of(segments)}
    if a.ndim == 1:
        return shard_over_data(op, {"a": a}, sharded)
    return shard_over_data(op, {}, {"a": a, **sharded})


def selective_scan(
    x: Float[Array, "b l d"],
    dt: Float[Array, "b l d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b l n"],
    C: Float[Array, "b l n"],
    D: Float[Array, " d"] | None = None,
    *,
    gate: Float[Array, "b l d"] | None = None,
    dt_bias: Float[Array, " d"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    segments: Segments | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b d n"]]:
    """Mamba's state-space model: outputs and the last state."""
    return shard_over_data(
        functools.partial(
            kernels.selective_scan, dt_softplus=dt_softplus, implementation=implementation
        ),
        {"A": A, "D": D, "dt_bias": dt_bias},
        {
            "x": x,
            "dt": dt,
            "B": B,
            "C": C,
            "gate": gate,
            "initial_state": initial_state,
            "segment_ids": index_of(segments),
        },
    )


def diagonal_ssm(
    u: Float[Array, "b l h"],
    log_a: Complex[Array, "h n"],
    c: Complex[Array, "h n"],
    *,
    initial_state: Complex[Array, "b h n"] | None = None,
    segments: Segments | None = None,
    reverse: bool = False,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b l h"], Complex[Array, "b h n"]]:
    """A diagonal state-space model for each channel (S4D): outputs and the last state."""
    return shard_over_data(
        functools.partial(kernels.diagonal_ssm, reverse=reverse, implementation=implementation),
        {"log_a": log_a, "c": c},
        {"u": u, "initial_state": initial_state, "segment_ids": index_of(segments)},
    )


def long_conv(
    u: Float[Array, "b l h"],
    kernel: Float[Array, "h k"],
    *,
    kernel_reverse: Float[Array, "h r"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b l h"]:
    """A convolution of every channel with a filter as long as the row; a row is one document."""
    return shard_over_data(
        functools.partial(kernels.long_conv, implementation=implementation),
        {"kernel": kernel, "kernel_reverse": kernel_reverse},
        {"u": u},
    )


def causal_conv1d(
    x: Float[Array, "b l d"],
    weight: Float[Array, "w d"],
    bias: Float[Array, " d"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[Array, "b v d"] | None = None,
    segments: Segments | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b v d"]]:
    """The short depthwise convolution: outputs and the window after the last real token."""
    return shard_over_data(
        functools.partial(
            kernels.causal_conv1d, activation=activation, implementation=implementation
        ),
        {"weight": weight, "bias": bias},
        {"x": x, "initial_state": initial_state, "segment_ids": index_of(segments)},
    )


def linear_attention(
    q: Float[Array, "b l g k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l h v"],
    log_decay: Float[Array | np.ndarray, "*blhk"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    segments: Segments | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b l h v"], Float[Array, "b h k v"]]:
    """``S_t = diag(exp g_t) S_{t-1} + k_t v_t^T``, ``o_t = scale S_t^T q_t``: outputs, the last S.

    ``log_decay`` g is None, ``(H,)``, ``(B, L, H)`` or ``(B, L, H, K)``.
    """
    op = functools.partial(kernels.linear_attention, scale=scale, implementation=implementation)
    sharded = {
        "q": q,
        "k": k,
        "v": v,
        "initial_state": initial_state,
        "segment_ids": index_of(segments),
    }
    if log_decay is not None and log_decay.ndim == 1:
        return shard_over_data(op, {"log_decay": log_decay}, sharded)
    return shard_over_data(op, {}, {"log_decay": log_decay, **sharded})


def delta_rule(
    q: Float[Array, "b l g k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l h v"],
    beta: Float[Array, "b l h"],
    log_decay: Float[Array, "b l h *k"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    segments: Segments | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b l h v"], Float[Array, "b h k v"]]:
    """``S' = diag(exp g_t) S_{t-1}``, ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T``,
    ``o_t = scale S_t^T q_t``: outputs and the last S."""
    return shard_over_data(
        functools.partial(kernels.delta_rule, scale=scale, implementation=implementation),
        {},
        {
            "q": q,
            "k": k,
            "v": v,
            "beta": beta,
            "log_decay": log_decay,
            "initial_state": initial_state,
            "segment_ids": index_of(segments),
        },
    )


def checkpoint_attention(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g v"],
    *,
    interval: int,
    segments: Segments | None = None,
    cache: Cache | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b l h v"]:
    """Softmax attention to the token itself and every ``interval``-th of its past.

    ``cache`` holds the checkpoints of each row's document before these tokens, in any dtype.
    """
    past: dict[str, Any] = {} if cache is None else cache.past(interval)
    past |= {name: past[name].astype(q.dtype) for name in ("past_k", "past_v") if past}
    return shard_over_data(
        functools.partial(
            kernels.checkpoint_attention, interval=interval, implementation=implementation
        ),
        {},
        {"q": q, "k": k, "v": v, "segment_ids": index_of(segments), **past},
    )


def extend_cache(
    cache: Cache,
    k: Float[Array, "b l g k"],
    v: Float[Array, "b l g v"],
    *,
    interval: int,
    segments: Segments | None = None,
) -> Cache:
    """The cache of ``checkpoint_attention`` after these tokens, of each row's last document."""
    dtype = cache.k.dtype
    return cache.extend(
        k.astype(dtype), v.astype(dtype), interval=interval, segment_ids=index_of(segments)
    )


def attention(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    q_segments: Int[Array, "b l"] | None = None,
    k_segments: Int[Array, "b s"] | None = None,
    k_positions: Int[Array, "b s"] | None = None,
) -> Float[Array, "b l h k"]:
    """``layers.attention.attend``. Keys of a cache have documents of their own: hence the arrays
    ``q_segments`` and ``k_segments``, ``index_of(segments)`` where keys are the queries' tokens."""
    return shard_over_data(
        functools.partial(attend, causal=causal, window=window, sinks=sinks, scale=scale),
        {},
        {
            "q": q,
            "k": k,
            "v": v,
            "q_segments": q_segments,
            "k_segments": k_segments,
            "k_positions": k_positions,
        },
        check_vma=q.shape[1] < SPLASH_FROM,  # splash does not know of it
    )


def bidirectional_mimo_scan(
    u: Float[Array, "b l h"],
    decay: Complex[Array, " p"],
    input_projection: Float[Array, "h q"],
    output_projection: Float[Array, "2*q h"],
    *,
    segments: Segments | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b l h"]:
    """A diagonal recurrence between two projections, both ways (S5, LRU).

    Rows of one document (``segments.single``) need no resets: what the recurrences do on padding is
    then unspecified, which mixers mask.
    """
    if segments is not None and segments.single:
        u, segments = mask_padding(u, segments), None
    return shard_over_data(
        functools.partial(kernels.bidirectional_mimo_scan, implementation=implementation),
        {
            "decay": decay,
            "input_projection": input_projection,
            "output_projection": output_projection,
        },
        {"u": u, "segment_ids": index_of(segments)},
    )


s4_kernel = kernels.s4_kernel  # of parameters alone: there are no rows to split
