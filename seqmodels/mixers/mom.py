"""Mixture of memories: a router, several matrix states of which a token takes a few, a shared one.

Du et al., "MoM: Linear Sequence Modeling with Mixture-of-Memories", 2025 (arXiv:2502.13685),
section 3.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from seqmodels import ops
from seqmodels.layers.experts import sow_load_balance
from seqmodels.layers.heads import l2_normalise, log_of_uniform, split_heads, step_bias
from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.base import (
    NO_DECAY_LABEL,
    ParamLabel,
    RecurrentState,
    Segments,
    index_of,
)
from seqmodels.mixers.matrix import QKV, DeltaConfig, MatrixMixer, Sizes, pieces
from seqmodels.mixers.published import Published
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class MoMConfig(DeltaConfig):
    """Configuration of a mixture of memories; the defaults are those of the 340M model.

    Attributes:
      memories: M.
      chosen: k, the memories of each token; of a single one the router learns by balance alone.
      shared: one more memory, which every token takes.
      rule: how a memory is written: "gated_delta" as by Gated DeltaNet, "gla" by a decay for each
        key and outer products.
      capacity: None, or the most tokens of a row that a memory takes in one call, as a multiple of
        the mean ``k / M``; those behind skip it. For rows of one document.
      heads, head_size: H and K.
      expand_v: V as a multiple of K.
      gate_temperature: with "gla" the log decay is ``logsigmoid(W x) / gate_temperature``.
    """

    mixer: ClassVar[str] = "mom"

    memories: Size = 4
    chosen: Size = 2
    shared: bool = True
    rule: Literal["gated_delta", "gla"] = "gated_delta"
    capacity: Positive | None = None
    heads: Size = 4
    head_size: Size = 256
    expand_v: Positive = 1.0
    gate_temperature: Positive = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen > self.memories:
            raise ValueError(
                f"MoMConfig: chosen={self.chosen} must be at most memories={self.memories}"
            )

    @property
    def supports_packing(self) -> bool:
        return self.capacity is None  # what a document's tokens take would be missing in the next

    @property
    def banks(self) -> dict[str, int]:
        """Memories by kind."""
        return {"routed": self.memories} | ({"shared": 1} if self.shared else {})

    @property
    def written(self) -> tuple[str, ...]:
        """Projections that each memory has of its own."""
        return ("k_proj", "v_proj", *(("b_proj", "a_proj") if self.delta else ("gk_proj",)))

    @property
    def delta(self) -> bool:
        return self.rule == "gated_delta"

    def param_labels(self) -> dict[str, ParamLabel]:
        return dict.fromkeys(("A_log", "dt_bias"), NO_DECAY_LABEL) if self.delta else {}

    def param_axes(self) -> dict[str, PartitionSpec]:
        names = [f"{bank}_{name}" for bank in self.banks for name in self.written]
        return dict.fromkeys(names, PartitionSpec(None, "embed", "inner"))


MOM_340M = Published(width=1024, layers=24, config=MoMConfig())
"""4 memories, 2 of them a token, and a shared one."""


class Routes(NamedTuple):
    """Where the tokens of each memory stand.

    A row of a batch has M rows of C tokens here. Where a mesh splits the length, each shard orders
    its own tokens, and all numbers are places in a shard.

    Attributes:
      weights, chosen: ``(B, L, k)``, the shares of a token's memories, 0 behind their capacity.
      place: ``(B, L, M)``, where a token stands that takes the memory.
      order: ``(B M, C)``, the tokens of a memory's rows: of each document those that take it in
        front, in order.
      takes: ``(B M, C)``, which of these do.
    """

    weights: Float[Array, "b l k"]
    chosen: Int[Array, "b l k"]
    place: Int[Array, "b l m"]
    order: Int[Array, "r c"]
    takes: Bool[Array, "r c"]


class MoM(MatrixMixer[MoMConfig]):
    """``o_t = sum_{m in top k} w_m o_t^(m) + o_t^(shared)``, a gated norm, a map.

    ``w = softmax(W_r x)`` over M memories, of the k largest, normalised. Memory m is a layer of its
    own over the tokens that take it: keys, values, ``β`` and the decay have projections of its own,
    short convolutions see its last tokens only, others leave it as it is. Queries, the
    convolutions' kernels, ``A_log`` and ``dt_bias`` are shared. In each row a memory's tokens stand
    in front of the others of their document, which costs M + 1 passes and no token is dropped,
    unless there is a ``capacity``.

    Sows ``("losses", "load_balance")``, see ``seqmodels.layers.experts``.

    Parameters: ``router``, ``q_proj``, ``g_proj``, ``o_proj``; ``routed_k_proj`` ``(M, D, H K)``
    and so on for ``v_proj``, ``b_proj``, ``a_proj`` (or ``gk_proj``), ``shared_k_proj``
    ``(1, D, H K)`` likewise; ``q_conv``, ``k_conv``, ``v_conv``, ``A_log``, ``dt_bias``,
    ``o_norm``. ``state`` is by kind of memory a dict of ``"recurrent_state"`` ``(B, M, H, K, V)``
    and the convolutions' windows ``(B, M, W - 1, channels)``.
    """

    @property
    def sizes(self) -> Sizes:
        config = self.config
        value = self.per_head(
            config.expand_v * config.head_size * config.heads, config.heads, "values"
        )
        return Sizes(config.heads, config.heads, config.head_size, value)

    @property
    def channels(self) -> dict[str, int]:
        """Channels of queries, keys and values."""
        sizes = self.sizes
        keys = sizes.heads * sizes.key
        return {"q": keys, "k": keys, "v": sizes.heads * sizes.value}

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros; ``dtype`` is that of convolutions' windows, ``max_length`` is unused."""
        sizes, split = self.sizes, pieces(self.sizes.value)
        shape = (sizes.heads * split, sizes.key, sizes.value // split)
        start = {}
        for bank, memories in self.config.banks.items():
            state = {"recurrent_state": jnp.zeros((batch_size, memories, *shape), jnp.float32)}
            for name, width in self.channels.items():
                window = start_window(batch_size * memories, self.config.conv_size, width, dtype)
                state[f"{name}_window"] = window.reshape(batch_size, memories, -1, width)
            start[bank] = state
        return RecurrentState.start(start, batch_size)

    def mix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> tuple[Float[Array, "b l d"], dict[str, Any]]:
        config, sizes = self.config, self.sizes
        entering = state.reset_at_document_start(segments)
        common = self._common()
        q = self.project(x, self.channels["q"], "q_proj")
        routes = self._route(x, segments)
        y, after = self._memories("routed", common, x, q, routes, entering, segments)
        o = ops.each_shard(
            collected, y=y, weights=routes.weights, chosen=routes.chosen, place=routes.place
        )
        kept = {"routed": after}
        if config.shared:
            y, kept["shared"] = self._memories("shared", common, x, q, None, entering, segments)
            o = o + y
        gate = self.project(x, self.channels["v"], "g_proj")
        return self.output_projection(split_heads(o, sizes.value), gate), kept

    def _common(self) -> "Common":
        config, heads = self.config, self.sizes.heads
        convs = {
            name: ShortConv(config.conv_size, use_bias=False, name=f"{name}_conv")
            for name in self.channels
        }
        if not config.delta:
            return Common(convs)
        # Not from 0: a head that starts there has no gradient to leave it.
        rate = jnp.exp(self.param("A_log", log_of_uniform(1e-4, 16.0), (heads,)))
        return Common(convs, rate, self.param("dt_bias", step_bias(), (heads,)))

    def _route(self, x: Float[Array, "b l d"], segments: Segments | None) -> Routes:
        config, length = self.config, x.shape[1]
        logits = self.project(x.astype(jnp.float32), config.memories, "router")
        shares = jax.nn.softmax(logits)
        top, chosen = jax.lax.top_k(shares, config.chosen)
        mask = None if segments is None else segments.mask
        sow_load_balance(self, shares, chosen, mask)

        takes = jnp.any(jax.nn.one_hot(chosen, config.memories, dtype=bool), axis=2)
        if mask is not None:
            takes = takes & mask[..., None]
        room = length
        if config.capacity is not None:
            share = config.capacity * config.chosen / config.memories
            room = min(length, math.ceil(share * length))
            takes = takes & (running_count(takes) <= room)
        index = index_of(segments)
        place, order, taken = ops.each_shard(
            functools.partial(ordered, room=room), takes=takes, index=index
        )
        weights = top / jnp.sum(top, axis=2, keepdims=True)
        fits = jnp.take_along_axis(takes, chosen, axis=2)
        return Routes(
            jnp.where(fits, weights, jnp.zeros_like(weights)), chosen, place, order, taken
        )

    def _memories(
        self,
        bank: str,
        common: "Common",
        x: Float[Array, "b l d"],
        q: Float[Array, "b l n"],
        routes: Routes | None,
        entering: dict[str, Any],
        segments: Segments | None,
    ) -> tuple[Float[Array, "r c v"], dict[str, Array]]:
        """Outputs of each memory of a kind, and its state; all memories are rows of one batch."""
        memories, sizes = self.config.banks[bank], self.sizes
        state = {name: folded(part) for name, part in entering[bank].items()}
        takes, rows = None, segments
        if routes is not None:
            takes = routes.takes
            x, q = (ops.each_shard(gathered, x=part, order=routes.order) for part in (x, q))
            rows = None if segments is None else of_memories(segments, routes.order)
        x = unfolded(x, memories)
        parts = {name[0]: self._projected(bank, name, x) for name in self.config.written}
        parts = {"q": q} | {name: folded(part) for name, part in parts.items()}
        after = {}
        for name, conv in common.convs.items():
            window = state[f"{name}_window"]
            parts[name], after[f"{name}_window"] = conv(
                parts[name], window, segments=rows, counted=takes
            )
        tokens = QKV(
            split_heads(parts["q"], sizes.key),
            split_heads(parts["k"], sizes.key),
            split_heads(parts["v"], sizes.value),
        )
        run = self._delta if self.config.delta else self._gla
        o, after["recurrent_state"] = run(common, tokens, parts, takes, state, rows)
        o = o.reshape(*o.shape[:2], self.channels["v"])
        return o, {name: unfolded(part, memories) for name, part in after.items()}

    def _projected(self, bank: str, name: str, x: Float[Array, "b m c d"]) -> Array:
        """``x`` of each memory by a matrix of its own; of gates in float32."""
        config, sizes = self.config, self.sizes
        keys = sizes.heads * sizes.key
        features = {
            "k_proj": keys,
            "v_proj": sizes.heads * sizes.value,
            "b_proj": sizes.heads,
            "a_proj": sizes.heads,
            "gk_proj": keys,
        }[name]
        shape = (config.banks[bank], self.width, features)
        init = nn.initializers.normal(config.init_std)
        kernel = self.param(f"{bank}_{name}", init, shape, jnp.float32)
        x = x if name in ("k_proj", "v_proj") else x.astype(jnp.float32)
        return jnp.einsum("bmcd,mdf->bmcf", x, kernel.astype(x.dtype))

    def _delta(
        self,
        common: "Common",
        tokens: QKV,
        parts: dict[str, Array],
        takes: Bool[Array, "r c"] | None,
        state: dict[str, Array],
        rows: Segments | None,
    ) -> tuple[Array, Array]:
        """The gated delta rule; what does not take the memory leaves it as it is."""
        tokens = tokens._replace(q=l2_normalise(tokens.q), k=l2_normalise(tokens.k))
        beta = jax.nn.sigmoid(parts["b"]) * (2.0 if self.config.negative_eigenvalues else 1.0)
        step = jax.nn.softplus(parts["a"] + jnp.broadcast_to(common.bias, parts["a"].shape))
        decay = -jnp.broadcast_to(common.rate, step.shape) * step
        beta, decay = (only(part, takes) for part in (beta, decay))
        return self.delta_rule(tokens, beta, decay, state["recurrent_state"], rows)

    def _gla(
        self,
        common: "Common",
        tokens: QKV,
        parts: dict[str, Array],
        takes: Bool[Array, "r c"] | None,
        state: dict[str, Array],
        rows: Segments | None,
    ) -> tuple[Array, Array]:
        """A decay for each key, and outer products, of the tokens that take the memory."""
        decay = jax.nn.log_sigmoid(parts["g"]) / self.config.gate_temperature
        decay = only(split_heads(decay, self.sizes.key), takes)
        tokens = tokens._replace(k=only(tokens.k, takes))
        return self.linear_attention(tokens, decay, state["recurrent_state"], rows)


class Common(NamedTuple):
    """What all memories of a layer use."""

    convs: dict[str, ShortConv]
    rate: Any = None
    bias: Any = None


def folded(x: Shaped[Array, "b m *c"]) -> Shaped[Array, "r *c"]:
    """Memories as rows of a batch."""
    return x.reshape(-1, *x.shape[2:])


def unfolded(x: Shaped[Array, "r *c"], memories: int) -> Shaped[Array, "b m *c"]:
    """The inverse of ``folded``."""
    return x.reshape(-1, memories, *x.shape[1:])


def running_count(takes: Bool[Array, "b l m"]) -> Float[Array, "b l m"]:
    """How many tokens have taken each memory, with each token: exact, below 2^24 of them."""
    return ops.linear_scan(jnp.ones(takes.shape[2:]), takes.astype(jnp.float32))[0]


def ordered(
    takes: Bool[Array, "b l m"], index: Int[Array, "b l"] | None, *, room: int
) -> tuple[Int[Array, "b l m"], Int[Array, "r c"], Bool[Array, "r c"]]:
    """``place``, ``order`` and ``takes`` of ``Routes``; no memory is taken more than ``room`` times
    where there is room for fewer tokens than L."""
    length = takes.shape[1]
    takes = jnp.moveaxis(takes, 2, 1)
    key = jnp.where(takes, 0, jnp.int32(1))
    if index is not None:
        document = jnp.where(index > 0, index, jnp.iinfo(jnp.int32).max // 4)
        key = key + 2 * document[:, None]
    order = jnp.argsort(key, axis=2, stable=True)
    place = jnp.moveaxis(jnp.argsort(order, axis=2), 1, 2)
    size = min(length, room)
    order = order[:, :, :size]
    takes = jnp.take_along_axis(takes, order, axis=2)
    return jnp.minimum(place, size - 1), folded(order), folded(takes)


def gathered(x: Float[Array, "b l d"], order: Int[Array, "r c"]) -> Float[Array, "r c d"]:
    """The tokens of each memory's rows."""
    rows = jnp.take_along_axis(x, order.reshape(x.shape[0], -1)[..., None], axis=1)
    return rows.reshape(*order.shape, -1)


def collected(
    y: Float[Array, "r c v"],
    weights: Float[Array, "b l k"],
    chosen: Int[Array, "b l k"],
    place: Int[Array, "b l m"],
) -> Float[Array, "b l v"]:
    """Each token's outputs of its memories, weighed and summed."""
    place = chosen * y.shape[1] + jnp.take_along_axis(place, chosen, axis=2)
    flat = y.reshape(chosen.shape[0], -1, y.shape[2])
    rows = jnp.take_along_axis(flat, place.reshape(flat.shape[0], -1)[..., None], axis=1)
    rows = rows.reshape(*place.shape, -1).astype(jnp.float32)
    return jnp.sum(rows * weights[..., None], axis=2).astype(y.dtype)


def only(x: Float[Array, "r c *n"], takes: Bool[Array, "r c"] | None) -> Float[Array, "r c *n"]:
    """``x`` with zeros where a token does not take the memory."""
    if takes is None:
        return x
    return jnp.where(takes.reshape(*takes.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros_like(x))


def of_memories(segments: Segments, order: Int[Array, "r c"]) -> Segments:
    """The documents of the memories' rows: tokens change places only within one."""

    def of_rows(part: Int[Array, "b l"], order: Int[Array, "r c"]) -> Int[Array, "r c"]:
        return jnp.repeat(part[:, : order.shape[1]], order.shape[0] // part.shape[0], axis=0)

    ids, index, positions = (
        ops.each_shard(of_rows, part=part, order=order)
        for part in (segments.ids, segments.index, segments.positions)
    )
    return Segments(ids, index, positions, segments.single)
