"""The ops that mixers and layers call: those of ``pallas_kernels``, on a mesh, for ``Segments``.

Shapes, dtypes and errors are those of the op of the same name in ``pallas_kernels``; ``segments``
stands in place of its segment ids. On a mesh every device works on its own rows, and on its part of
their length, see ``seqmodels.parallel.shards``; this is the one place where mixers meet the mesh.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Inexact, Int, Shaped

import pallas_kernels as kernels
from pallas_kernels.checkpoint_attention import Cache
from pallas_kernels.common.dispatch import Implementation
from seqmodels.layers import circular
from seqmodels.layers.attention import SPLASH_FROM, attend
from seqmodels.parallel import mapping, shards, summaries
from seqmodels.parallel.mesh import shards_of
from seqmodels.segments import Segments, index_of, mask_padding

_CHANNELS = (2, 1)
"""Where outputs ``(B, L, D, ..)`` and states ``(B, D, ..)`` have their channels or heads."""


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
    options: dict[str, Any] = {"reverse": reverse, "implementation": implementation}
    constant = {"a": a} if a.ndim == 1 else {}
    op = functools.partial(kernels.linear_scan, **options)
    return shards.recurrence(
        "linear_scan",
        op,
        shards.twice(op, functools.partial(summaries.linear_scan, **options)),
        constant,
        {"b": b} if constant else {"a": a, "b": b},
        initial_state,
        segments,
        channels=mapping.elements(
            b.shape[2], {"a": a.ndim - 1, "b": 2, "initial_state": 1}, _CHANNELS
        ),
        reverse=reverse,
    )


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
    options: dict[str, Any] = {"dt_softplus": dt_softplus, "implementation": implementation}
    op = functools.partial(kernels.selective_scan, **options)

    def summary(*, D: Any, gate: Any, **arrays: Any) -> tuple[Array, Array]:
        return summaries.selective_scan(**arrays, **options)

    return shards.recurrence(
        "selective_scan",
        op,
        shards.twice(op, summary),
        {"A": A, "D": D, "dt_bias": dt_bias},
        {"x": x, "dt": dt, "B": B, "C": C, "gate": gate},
        initial_state,
        segments,
        channels=mapping.elements(
            x.shape[2],
            dict.fromkeys(("A", "D", "dt_bias"), 0)
            | dict.fromkeys(("x", "dt", "gate"), 2)
            | {"initial_state": 1},
            _CHANNELS,
        ),
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
    options: dict[str, Any] = {"reverse": reverse, "implementation": implementation}
    op = functools.partial(kernels.diagonal_ssm, **options)
    return shards.recurrence(
        "diagonal_ssm",
        op,
        shards.twice(op, functools.partial(summaries.diagonal_ssm, **options)),
        {"log_a": log_a, "c": c},
        {"u": u},
        initial_state,
        segments,
        channels=mapping.elements(
            u.shape[2], {"u": 2, "log_a": 0, "c": 0, "initial_state": 1}, _CHANNELS
        ),
        reverse=reverse,
    )


def diagonal_ssm_filter(
    log_a: Complex[Array, "h n"],
    c: Complex[Array, "h n"],
    *,
    length: int,
    implementation: Implementation = None,
) -> Float[Array, "h l"]:
    """What ``diagonal_ssm`` makes of a single 1: of parameters alone, no rows are split."""

    def run(log_a: Array, c: Array) -> Array:
        impulse = jnp.zeros((1, length, c.shape[0]), jnp.float32).at[:, 0].set(1.0)
        return kernels.diagonal_ssm(impulse, log_a, c, implementation=implementation)[0][0].T

    return mapping.over_channels(
        run,
        {"log_a": log_a, "c": c},
        mapping.elements(c.shape[0], {"log_a": 0, "c": 0}, 0),
    )


def flip(x: Shaped[Array, "b l *d"], segments: Segments | None) -> Shaped[Array, "b l *d"]:
    """Each row's real tokens in reverse order; padding stays at the end."""

    def turned(u: Array, segment_index: Array | None) -> Array:
        return kernels.segments.flip(u, segment_index)

    channels = x.reshape(*x.shape[:2], -1)
    index = {"segment_index": index_of(segments)}
    return shards.channels(turned, {}, channels, index).reshape(x.shape)


def each_shard(function: Callable[..., Any], **tokens: Any) -> Any:
    """``function(**tokens)``; where a mesh splits the length, of each shard's tokens alone.

    Args:
      function: takes arrays by name, or None, and returns one or several, all of whose axes 0 and 1
        are rows and tokens, or multiples of them.
    """
    return mapping.each_shard(function, tokens)


def each_channel(
    function: Callable[..., Any],
    u: Float[Array, "b l h"],
    *,
    shared: dict[str, Any] | None = None,
    rows: dict[str, Any] | None = None,
    tokens: dict[str, Any] | None = None,
    stateful: bool = False,
) -> Any:
    """``function(u=u, **shared, **rows, **tokens)``, which treats each channel by itself.

    Where a mesh splits the length, channels change places for whole rows.

    Args:
      function: returns ``(B, L, H)`` and, if ``stateful``, a state ``(B, H, ...)``.
      u: inputs.
      shared, rows, tokens: more arrays, ``(H, ...)``, ``(B, H, ...)`` and ``(B, L)``, or None.
    """
    return shards.channels(function, shared or {}, u, tokens, rows, stateful=stateful)


def long_conv(
    u: Float[Array, "b l h"],
    kernel: Float[Array, "h k"],
    *,
    kernel_reverse: Float[Array, "h r"] | None = None,
    window: Float[Array, "b w h"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b l h"]:
    """A convolution of every channel with a filter as long as the row; a row is one document.

    ``window`` are the inputs before ``u``, which a causal filter sees too.
    """

    def run(u: Array, window: Array | None, **filters: Any) -> Array:
        if window is None:
            return kernels.long_conv(u, **filters, implementation=implementation)
        line = jnp.concatenate([jnp.moveaxis(window, 1, 2).astype(u.dtype), u], axis=1)
        y = kernels.long_conv(line, **filters, implementation=implementation)
        return y[:, window.shape[2] :]

    return shards.channels(
        run,
        {"kernel": kernel, "kernel_reverse": kernel_reverse},
        u,
        rows={"window": None if window is None else jnp.moveaxis(window, 2, 1)},
    )


def circular_mix(
    x: Float[Array, "b l h"],
    u: Float[Array, "b l h"],
    q_taps: Float[Array, "h w"],
    k_taps: Float[Array, "h w"],
    *,
    segments: Segments | None = None,
) -> Float[Array, "b l h"]:
    """Orchid's circular convolution of ``u`` with the filter that it makes of ``x``; float32.

    Both are 0 on padding. Where the length is split, channels change places for whole rows.
    """

    def mix(u: Array, q_taps: Array, k_taps: Array, ids: Array | None) -> Array:
        x, u = u[..., 0], u[..., 1]
        lengths = None if ids is None else jnp.sum(ids != 0, axis=1, dtype=jnp.int32)
        q, k = (circular.short(x, taps, lengths) for taps in (q_taps, k_taps))
        if ids is not None:
            q, k = (jnp.where((ids != 0)[..., None], y, jnp.zeros_like(y)) for y in (q, k))
        h = circular.correlate(k, q, lengths)
        if lengths is None:
            return circular.convolve(h / x.shape[1], u, lengths)
        count = jnp.maximum(lengths, 1).astype(x.dtype)[:, None, None]
        return circular.convolve(h / count, u, lengths)

    both = jnp.stack([x.astype(jnp.float32), u.astype(jnp.float32)], axis=-1)
    ids = None if segments is None else segments.ids
    return shards.channels(mix, {"q_taps": q_taps, "k_taps": k_taps}, both, {"ids": ids})


def causal_conv1d(
    x: Float[Array, "b l d"],
    weight: Float[Array, "w d"],
    bias: Float[Array, " d"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[Array, "b v d"] | None = None,
    segments: Segments | None = None,
    counted: Bool[Array, "b l"] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "b v d"]]:
    """The short depthwise convolution: outputs and the window after the last real token.

    Tokens that are not ``counted`` are in no window; they stand behind those of their document that
    are, or where a mesh splits the length, behind those of their shard. What comes out for them is
    unspecified.
    """
    return shards.convolution(
        functools.partial(
            kernels.causal_conv1d, activation=activation, implementation=implementation
        ),
        {"weight": weight, "bias": bias},
        x,
        initial_state,
        segments,
        counted,
        width=weight.shape[0] - 1,
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
    reverse: bool = False,
    implementation: Implementation = None,
) -> tuple[Float[Array, "b l h v"], Float[Array, "b h k v"]]:
    """``S_t = diag(exp g_t) S_{t-1} + k_t v_t^T``, ``o_t = scale S_t^T q_t``: outputs, the last S.

    ``log_decay`` g is None, ``(H,)``, ``(B, L, H)`` or ``(B, L, H, K)``. ``reverse`` is as
    ``linear_scan`` has it.
    """
    constant = log_decay is not None and log_decay.ndim == 1
    decay = {"log_decay": log_decay}
    op: Any = functools.partial(
        kernels.linear_attention, scale=scale, implementation=implementation
    )

    def left(state: Array, *, q: Array, k: Array, **arrays: Any) -> Array:
        return summaries.decay_of_linear_attention(state, **arrays)

    def read(*, k: Array, v: Array, **arrays: Any) -> Array:
        return summaries.entering(**arrays, scale=scale)

    if reverse:
        op, read = shards.backwards(op), shards.backwards(read)
    q, k = mapping.shared_heads(q, k)
    return shards.recurrence(
        "linear_attention",
        op,
        shards.once(op, left, read),
        decay if constant else {},
        {"q": q, "k": k, "v": v} | ({} if constant else decay),
        initial_state,
        segments,
        channels=_heads("linear_attention", v, {"log_decay": 0 if constant else 2}),
        reverse=reverse,
    )


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
    op = functools.partial(kernels.delta_rule, scale=scale, implementation=implementation)
    summary = functools.partial(summaries.delta_rule, implementation=implementation)
    q, k = mapping.shared_heads(q, k)
    return shards.recurrence(
        "delta_rule",
        op,
        shards.twice(op, summary),
        {},
        {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay},
        initial_state,
        segments,
        channels=_heads("delta_rule", v, {"beta": 2, "log_decay": 2}),
        matrix=True,
    )


def _heads(op: str, v: Array, more: dict[str, int]) -> mapping.Channels:
    """The heads of an op with a matrix state, of values ``v``."""
    axes = {"q": 2, "k": 2, "v": 2, "initial_state": 1} | more
    return mapping.heads(op, v.shape[2], axes, _CHANNELS)


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
    return shards.checkpoint_attention(
        functools.partial(
            kernels.checkpoint_attention, interval=interval, implementation=implementation
        ),
        {"q": q, "k": k, "v": v},
        past,
        segments,
        interval=interval,
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
    options: dict[str, Any] = {"causal": causal, "window": window, "sinks": sinks, "scale": scale}
    return shards.attention(
        functools.partial(attend, **options),
        {
            "q": q,
            "k": k,
            "v": v,
            "q_segments": q_segments,
            "k_segments": k_segments,
            "k_positions": k_positions,
        },
        options,
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
    then unspecified, which mixers mask. Where the length is split, each way exchanges its states;
    there, and where a mesh has a model axis, each way is a scan of its own.
    """
    if segments is not None and segments.single:
        u, segments = mask_padding(u, segments), None
    if shards_of(u.shape[1]) > 1 or mapping.splits_channels():
        return _two_scans(u, decay, input_projection, output_projection, segments)
    return mapping.over_rows(
        functools.partial(kernels.bidirectional_mimo_scan, implementation=implementation),
        {
            "decay": decay,
            "input_projection": input_projection,
            "output_projection": output_projection,
        },
        {"u": u, "segment_ids": index_of(segments)},
    )


def _two_scans(
    u: Float[Array, "b l h"],
    decay: Complex[Array, " p"],
    input_projection: Float[Array, "h q"],
    output_projection: Float[Array, "2*q h"],
    segments: Segments | None,
) -> Float[Array, "b l h"]:
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    drive = jax.lax.complex(*jnp.split(dot(u, input_projection), 2, axis=-1))
    ways = (linear_scan(decay, drive, segments=segments, reverse=r)[0] for r in (False, True))
    planes = [z for h in ways for z in (h.real, h.imag)]
    return dot(jnp.concatenate(planes, axis=-1), output_projection)


def s4_kernel(
    dt: Float[Array, " h"],
    eigenvalues: Complex[Array, "h n"],
    p: Complex[Array, "h n"],
    b: Complex[Array, "h n"],
    c: Complex[Array, "r h n"],
    *,
    length: int,
    implementation: Implementation = None,
) -> Float[Array, "r h l"]:
    """The filter of S4: of parameters alone, there are no rows to split."""
    return mapping.over_channels(
        functools.partial(kernels.s4_kernel, length=length, implementation=implementation),
        {"dt": dt, "eigenvalues": eigenvalues, "p": p, "b": b, "c": c},
        mapping.elements(dt.shape[0], {"dt": 0, "eigenvalues": 0, "p": 0, "b": 0, "c": 1}, 1),
    )
