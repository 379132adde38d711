"""Operators whose rows a mesh splits in their length: what each of them exchanges with others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.common import compat, dispatch, segments
from seqmodels.parallel import softmax, windows
from seqmodels.parallel.checkpoints import earlier_checkpoints
from seqmodels.parallel.collectives import token_index
from seqmodels.parallel.documents import continues, index_and_positions
from seqmodels.parallel.halo import halo_before
from seqmodels.parallel.mapping import (
    ROWS,
    TOKENS,
    WHOLE,
    Arrays,
    Channels,
    elements,
    heads,
    joined,
    model_axis,
    over_rows,
    over_tokens,
    planes,
    shared_heads,
)
from seqmodels.parallel.mesh import shards_of
from seqmodels.parallel.state import entering_state
from seqmodels.parallel.strategies import strategy_of

CONVOLUTION = {"x": 2, "weight": 1, "bias": 0, "initial_state": 2}
"""Axes of a convolution's channels."""


def documents(ids: Any) -> tuple[Array, Array]:
    """Segment index and positions of ``ids (B, L)``, on a mesh that splits their length."""
    size = shards_of(ids.shape[1])

    def local(shared: Arrays, rows: Arrays, tokens: Arrays) -> tuple[Array, Array]:
        return index_and_positions(tokens["ids"], axis="seq", size=size)

    return over_tokens(local, TOKENS, {}, {}, {"ids": ids})


Finish = Callable[[Array], tuple[Array, Array]]
Shard = Callable[..., tuple[Array, Array, Finish]]


def twice(
    op: Callable[..., tuple[Array, Array]], summary: Callable[..., tuple[Array, Array]]
) -> Shard:
    """A shard that goes over its tokens for its summary, and again from the state that enters."""

    def shard(**arrays: Any) -> tuple[Array, Array, Finish]:
        decay, state = summary(**arrays)
        return decay, state, lambda entering: op(**arrays, initial_state=entering)

    return shard


def once(
    op: Callable[..., tuple[Array, Array]],
    decay: Callable[..., Array],
    read: Callable[..., Array],
) -> Shard:
    """A shard that goes over its tokens from zero, and adds what the state that enters makes.

    Args:
      op: linear in its initial state.
      decay: ``(state, **arrays)`` -> that of the shard.
      read: ``(**arrays, initial_state=)`` -> what a state adds to the outputs.
    """

    def shard(**arrays: Any) -> tuple[Array, Array, Finish]:
        y, state = op(**arrays)
        left = decay(state, **arrays)

        def finish(entering: Array) -> tuple[Array, Array]:
            more = read(**arrays, initial_state=entering)
            return (y.astype(more.dtype) + more).astype(y.dtype), state + left * entering

        return left, state, finish

    return shard


def recurrence(
    name: str,
    op: Callable[..., tuple[Array, Array]],
    shard: Shard,
    shared: Arrays,
    tokens: Arrays,
    initial_state: Any,
    segments: Any,
    *,
    channels: Channels = WHOLE,
    matrix: bool = False,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """``op(**shared, **tokens, initial_state=, segment_ids=)``: outputs and the last state.

    Where the length is split, each shard sums itself up, finds the state that enters it by an
    exchange of what all of them do to a state, and runs from there.

    Args:
      name: of the op, for ``strategy_of``.
      op: returns outputs ``(B, L, ...)`` and the state after a row.
      shard: ``(**shared, **tokens, segment_ids=)`` -> decay and state of this shard, see
        ``pallas_kernels.common.backend.summarize``, and a function of the state that enters to what
        ``op`` returns; ``once`` or ``twice``.
      shared, tokens: arguments that every device has in full; those ``(B, L, ...)``, or None.
      initial_state: ``(B, ...)`` or None.
      segments: ``Segments`` or None.
      channels: what the mesh's model axis splits.
      matrix: whether the decay is a matrix.
      reverse: whether the op runs from the last token to the first.
    """
    length = next(x for x in tokens.values() if x is not None).shape[1]
    size = shards_of(length)
    index = None if segments is None else segments.index
    if size == 1:
        rows = {**tokens, "initial_state": initial_state, "segment_ids": index}
        return over_rows(op, shared, rows, channels=channels)
    strategy = strategy_of(name, size)
    options: dict[str, Any] = {"strategy": strategy, "matrix": matrix, "reverse": reverse}
    exchange = functools.partial(entering_state, axis="seq", size=size, **options)

    def local(shared: Arrays, rows: Arrays, tokens: Arrays) -> tuple[Array, Array]:
        tokens = dict(tokens)
        positions = tokens.pop("positions")
        decay, state, finish = shard(**shared, **tokens)
        kept = None
        if positions is not None:
            kept = continues(tokens["segment_ids"], positions, "seq")
            decay = _where(kept, decay)
            # Backwards, what a shard leaves is stopped at its first token, the last of its own.
            state = _where(kept, state) if reverse else state
        initial = rows["initial_state"]
        initial = jnp.zeros_like(state) if initial is None else initial
        entering = _chosen(name, size, strategy, exchange, decay, state, initial)
        if kept is not None and not reverse:
            entering = _where(kept, entering)
        y, final = finish(entering)
        return y, _of_shard(0 if reverse else size - 1, final)

    tokens = {
        **tokens,
        "segment_ids": index,
        "positions": None if segments is None else segments.positions,
    }
    rows = {"initial_state": initial_state}
    return over_tokens(local, (TOKENS, ROWS), shared, rows, tokens, channels=channels)


def convolution(
    op: Callable[..., tuple[Array, Array]],
    shared: Arrays,
    x: Array,
    initial_state: Any,
    segments: Any,
    counted: Any = None,
    *,
    width: int,
) -> tuple[Array, Array]:
    """``op(**shared, x=, initial_state=, segment_ids=)``, a convolution that sees ``width`` tokens
    before each: outputs, and the window after the last real token.

    ``counted (B, L)``, or None, are the tokens that windows have, see
    ``seqmodels.ops.causal_conv1d``.
    """
    if counted is not None:
        return _counted_convolution(op, shared, x, initial_state, segments, counted, width=width)
    size = shards_of(x.shape[1])
    index = None if segments is None else segments.index
    split = elements(x.shape[2], CONVOLUTION, (2, 2))
    if size == 1:
        rows = {"x": x, "initial_state": initial_state, "segment_ids": index}
        return over_rows(op, shared, rows, channels=split)

    def local(shared: Arrays, rows: Arrays, tokens: Arrays) -> tuple[Array, Array]:
        x, index, positions = tokens["x"], tokens["index"], tokens["positions"]
        window = halo_before(x, width, initial=rows["initial_state"], axis="seq")
        last: Any = size - 1
        if index is not None:
            # The first document of a row, or a row of padding, has the row's initial window.
            reach = jnp.where(index[:, :1] <= 1, width, positions[:, :1])
            distance = width - jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
            window = jnp.where((distance <= reach)[..., None], window, jnp.zeros_like(window))
            real = jax.lax.psum(jnp.sum(index != 0, axis=1, dtype=jnp.int32), "seq")
            last = jnp.maximum(real - 1, 0) // x.shape[1]
        y, final = op(**shared, x=x, initial_state=window, segment_ids=index)
        return y, _of_shard(last, final)

    tokens = {
        "x": x,
        "index": index,
        "positions": None if segments is None else segments.positions,
    }
    rows = {"initial_state": initial_state}
    return over_tokens(local, (TOKENS, ROWS), shared, rows, tokens, channels=split)


def _counted_convolution(
    op: Callable[..., tuple[Array, Array]],
    shared: Arrays,
    x: Array,
    initial_state: Any,
    segments: Any,
    counted: Array,
    *,
    width: int,
) -> tuple[Array, Array]:
    """``convolution`` whose windows have the counted tokens."""
    size = shards_of(x.shape[1])
    split = elements(x.shape[2], CONVOLUTION, (2, 2))
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], width, x.shape[2]), x.dtype)
    index = None if segments is None else segments.index

    def run(
        *, x: Array, counted: Array, index: Any, initial_state: Array, **shared: Any
    ) -> tuple[Array, Array]:
        y, _ = op(**shared, x=x, initial_state=initial_state, segment_ids=index)
        return y, windows.after(x, counted, index, initial_state)

    tokens = {"x": x, "counted": counted, "index": index}
    rows = {"initial_state": initial_state}
    if size == 1:
        return over_rows(run, shared, tokens | rows, channels=split)

    def local(shared: Arrays, rows: Arrays, tokens: Arrays) -> tuple[Array, Array]:
        tokens = dict(tokens)
        positions = tokens.pop("positions")
        window = windows.entering(
            **tokens, positions=positions, initial=rows["initial_state"], axis="seq"
        )
        y, final = run(**shared, **tokens, initial_state=window)
        return y, _of_shard(size - 1, final)  # padding leaves a window as it is

    tokens["positions"] = None if segments is None else segments.positions
    return over_tokens(local, (TOKENS, ROWS), shared, rows, tokens, channels=split)


def channels(
    op: Callable[..., Any],
    shared: Arrays,
    u: Array,
    tokens: Arrays | None = None,
    rows: Arrays | None = None,
    *,
    stateful: bool = False,
) -> Any:
    """``op(**shared, **rows, u=, **tokens)``, which treats each channel of ``u (B, L, H)`` by
    itself.

    Where the length is split, each shard takes whole rows of its part of the channels: they change
    places by an all-to-all, and back by another.

    Args:
      shared: arrays ``(H, ...)`` or None.
      tokens: arrays ``(B, L)`` or None, which all channels need.
      rows: arrays ``(B, H, ...)``.
      stateful: whether ``op`` returns a state ``(B, H, ...)`` beside ``(B, L, H)``.
    """
    size = shards_of(u.shape[1])
    tokens, rows = tokens or {}, rows or {}
    axes = {"u": 2} | dict.fromkeys(shared, 0) | dict.fromkeys(rows, 1)
    split = elements(u.shape[2], axes, (2, 1) if stateful else 2)
    if size == 1:
        return over_rows(op, shared, {"u": u, **rows, **tokens}, channels=split)
    width = u.shape[2] // (model_axis() if split.arrays else 1)
    part = -(-width // size)

    def own(x: Array, axis: int) -> Array:
        """The channels of this shard; those that there are not, are 0."""
        padding = [(0, part * size - width if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, padding)

    def mine(arrays: Arrays, axis: int) -> dict[str, Any]:
        first = jax.lax.axis_index("seq") * part
        return {
            name: x if x is None else jax.lax.dynamic_slice_in_dim(own(x, axis), first, part, axis)
            for name, x in arrays.items()
        }

    def everywhere(state: Array) -> Array:
        """The channels of all shards."""
        whole = jnp.zeros((state.shape[0], part * size, *state.shape[2:]), state.dtype)
        whole = compat.match_vma(whole, state)[0]
        first = jax.lax.axis_index("seq") * part
        whole = jax.lax.dynamic_update_slice_in_dim(whole, state, first, axis=1)
        return joined(jax.lax.psum(planes(whole[:, :width]), "seq"))

    def local(shared: Arrays, rows: Arrays, tokens: Arrays) -> Any:
        exchanged = {"axis_name": "seq", "tiled": True}
        tokens = dict(tokens)
        u = jax.lax.all_to_all(own(tokens.pop("u"), 2), split_axis=2, concat_axis=1, **exchanged)
        whole = {
            name: x if x is None else jax.lax.all_gather(x, "seq", axis=1, tiled=True)
            for name, x in tokens.items()
        }
        y = op(u=u, **mine(shared, 0), **mine(rows, 1), **whole)
        state: Any = None
        if stateful:
            y, state = y
        y = jax.lax.all_to_all(y, split_axis=1, concat_axis=2, **exchanged)[..., :width]
        return (y, everywhere(state)) if stateful else y

    specs = (TOKENS, ROWS) if stateful else TOKENS
    return over_tokens(local, specs, shared, rows, {"u": u, **tokens}, channels=split)


def backwards(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` from the last real token to the first, on arrays that are turned, and turned back.

    Args:
      op: takes arrays by name, those ``(B, L, ...)`` and others of one axis, and returns outputs
        ``(B, L, ...)``, and maybe a state.
    """

    def turned(*, initial_state: Any = None, segment_ids: Any = None, **arrays: Any) -> Any:
        def turn(x: Any) -> Any:
            return x if x is None or x.ndim == 1 else segments.flip(x, segment_ids)

        arrays = {name: turn(x) for name, x in arrays.items()}
        if initial_state is not None:
            arrays["initial_state"] = initial_state
        if segment_ids is not None:
            arrays["segment_ids"] = segments.flip(segment_ids, segment_ids)
        result = op(**arrays)
        return (turn(result[0]), result[1]) if isinstance(result, tuple) else turn(result)

    return turned


def checkpoint_attention(
    op: Callable[..., Array], tokens: Arrays, past: Arrays, segments: Any, *, interval: int
) -> Array:
    """``op(**tokens, **past, segment_ids=)``, whose shards gather the checkpoints of the row.

    Args:
      op: takes q, k, v, and what continues a document, as ``pallas_kernels.checkpoint_attention``.
      tokens: q, k and v.
      past: the checkpoints of each row's document before the row, and its offset; or nothing.
      segments: ``Segments`` or None.
      interval: tokens from one checkpoint to the next.
    """
    index = None if segments is None else segments.index
    tokens, past, split = _heads("checkpoint_attention", tokens, past)
    if shards_of(tokens["q"].shape[1]) == 1:
        rows = {**tokens, "segment_ids": index, **past}
        return over_rows(op, {}, rows, channels=split)

    def local(shared: Arrays, rows: Arrays, tokens: Arrays) -> Array:
        q, k, v = (tokens[name] for name in ("q", "k", "v"))
        index, positions = tokens["index"], tokens["positions"]
        before = None
        if rows:
            before = rows["past_k"], rows["past_v"], rows["past_length"]
            if positions is None:
                positions = token_index(q.shape[1], "seq")
            offset = rows["offset"][:, None]
            first = True if index is None else index == 1
            positions = positions + jnp.where(first, offset, jnp.zeros_like(offset))
        earlier = earlier_checkpoints(
            k, v, interval=interval, segments=index, positions=positions, past=before, axis="seq"
        )
        return op(q=q, k=k, v=v, segment_ids=index, **earlier._asdict())

    positions = None if segments is None else segments.positions
    tokens = {**tokens, "index": index, "positions": positions}
    return over_tokens(local, TOKENS, {}, past, tokens, channels=split)


def attention(
    op: Callable[..., Array], arrays: Arrays, options: Mapping[str, Any], *, check_vma: bool
) -> Array:
    """``op(**arrays)``, softmax attention, by one of the strategies where the length is split.

    Args:
      op: ``attend``, with ``options``.
      arrays: its arrays by name.
      options: ``causal``, ``window``, ``sinks`` and ``scale``.
      check_vma: as in `jax.shard_map`.
    """
    length, keys = arrays["q"].shape[1], arrays["k"].shape[1]
    size = shards_of(length)
    arrays, _, split = _heads("attention", arrays, {})
    if size == 1:
        return over_rows(op, {}, arrays, channels=split, check_vma=check_vma)
    if length != keys:
        return _attention_to_cache(op, arrays, split, causal=options["causal"], check_vma=check_vma)
    name = "attention" if options["window"] is None else "sliding_window"
    strategy = strategy_of(name, size)

    def local(shared: Arrays, rows: Arrays, tokens: Arrays) -> Array:
        run = functools.partial(softmax.run, strategy, **options)
        return _chosen(name, size, strategy, lambda tokens: run(**tokens), tokens)

    names = {"q": "q", "k": "k", "v": "v", "q_segments": "segments", "k_positions": "positions"}
    tokens = {new: arrays[old] for old, new in names.items()}
    return over_tokens(local, TOKENS, {}, {}, tokens, channels=split, check_vma=check_vma)


def _attention_to_cache(
    op: Callable[..., Array], arrays: Arrays, split: Channels, *, causal: bool, check_vma: bool
) -> Array:
    """``op(**arrays)`` of queries that are split to keys of which every shard has all.

    The keys behind a shard's last query go in front of the others, where nothing sees them.
    """
    queries = {name: arrays[name] for name in ("q", "q_segments")}
    keys: dict[str, Any] = {name: x for name, x in arrays.items() if name not in queries}
    shape = keys["k"].shape[:2]
    if keys["k_segments"] is None:
        queries["q_segments"] = jnp.ones(arrays["q"].shape[:2], jnp.int32)
        keys["k_segments"] = jnp.ones(shape, jnp.int32)

    def local(shared: Arrays, rows: Arrays, tokens: Arrays) -> Array:
        if not causal:
            return op(**rows, **tokens)
        size, rank = jax.lax.axis_size("seq"), jax.lax.axis_index("seq")
        behind = (size - 1 - rank) * tokens["q"].shape[1]
        turned: dict[str, Any] = dict(rows)
        turned |= {name: jnp.roll(x, behind, axis=1) for name, x in rows.items() if x is not None}
        unseen = jnp.arange(shape[1], dtype=jnp.int32)[None] < behind
        nothing = jnp.iinfo(jnp.int32).min
        turned["k_segments"] = jnp.where(unseen, nothing, turned["k_segments"])
        return op(**turned, **tokens)

    return over_tokens(local, TOKENS, {}, keys, queries, channels=split, check_vma=check_vma)


def _heads(what: str, tokens: Arrays, past: Arrays) -> tuple[Arrays, Arrays, Channels]:
    """The arrays of softmax attention with keys for each part of the heads, and what is split."""
    count = tokens["q"].shape[2]
    split = heads(what, count, dict.fromkeys(("q", "k", "v", "past_k", "past_v"), 2), 2)
    tokens, past = dict(tokens), dict(past)
    for arrays, names in ((tokens, ("k", "v")), (past, ("past_k", "past_v"))):
        if arrays:
            parts = shared_heads(*(arrays[name] for name in names))
            arrays.update(zip(names, parts, strict=True))
    return tokens, past, split


def _chosen(
    name: str, size: int, strategy: str, exchange: Callable[..., Array], *arguments: Any
) -> Array:
    """``exchange(*arguments)``, of which ``pallas_kernels.explain`` is told."""
    op = f"{name} over {size} shards"
    return dispatch.choose(op, {strategy: exchange}, *arguments, default=strategy)


def _where(rows: Array, x: Array) -> Array:
    """``x (B, ...)``, and 0 in the other rows."""
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))


def _of_shard(shard: Any, x: Array) -> Array:
    """``x`` of one shard, on all of them; ``shard`` is a number, or one for each row."""
    here = jnp.broadcast_to(jax.lax.axis_index("seq") == shard, x.shape[:1])
    return joined(jax.lax.psum(planes(_where(here, x)), "seq"))
