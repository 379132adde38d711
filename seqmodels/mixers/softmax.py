"""What mixers with softmax attention share: projections, positions, states with caches."""

import dataclasses
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqmodels.layers.heads import GatedNorm, merge_heads, split_heads
from seqmodels.layers.norms import ZeroCenteredRMSNorm
from seqmodels.layers.projections import dense
from seqmodels.layers.rotary import rotary
from seqmodels.mixers.base import Mixer, MixerConfig, RecurrentState, Segments, mask_padding
from seqmodels.ranges import Portion, Positive, Size


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig(MixerConfig):
    """Configuration that mixers of grouped heads have.

    Attributes:
      heads: H, of queries.
      kv_heads: G, of keys and values; None for as many as queries have.
      head_size: K; None for ``width / heads``.
      rotary_base: of the rotary embedding of queries and keys; None for no positions at all.
      rotary_fraction: share of a head's channels that are rotated.
      qk_norm: RMS norm of each head's queries and keys, with a scale, before the rotation.
      zero_centered_norm: that scale is ``1 + scale``, from 0 (Gemma, Qwen3-Next).
      output_gate: each head's outputs are multiplied by ``sigmoid(W_g x)`` (Qiu et al., "Gated
        Attention for Large Language Models", 2025).
      score_scale: of the products of queries and keys; None for ``K**-0.5``.
      norm_epsilon: added to the mean square in that norm.
      init_std: deviation of the projections' normal initialisation.
      use_bias: biases in the projections.
      use_out_bias: bias of the output's projection; None for as the others.
    """

    heads: Size = 16
    kv_heads: Size | None = None
    head_size: Size | None = None
    rotary_base: Positive | None = 1e4
    rotary_fraction: Portion = 1.0
    qk_norm: bool = False
    zero_centered_norm: bool = False
    output_gate: bool = False
    score_scale: Positive | None = None
    norm_epsilon: Positive = 1e-6
    init_std: Positive = 0.02
    use_bias: bool = False
    use_out_bias: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.groups:
            raise ValueError(
                f"{type(self).__name__}: kv_heads={self.kv_heads} must divide heads={self.heads}"
            )
        if self.zero_centered_norm and not self.qk_norm:
            raise ValueError(f"{type(self).__name__}: zero_centered_norm=True needs qk_norm=True")

    @property
    def groups(self) -> int:
        """G."""
        return self.heads if self.kv_heads is None else self.kv_heads


Config = TypeVar("Config", bound=MixerConfig)


class CachingMixer(Mixer[Config]):
    """A mixer whose ``state`` is a dict of arrays, caches among them.

    Subclasses write ``mix`` and ``empty``. A cache that grows has to know how far, so that a call
    without a state returns one that cannot be continued: its ``state`` is None.
    """

    def mix(
        self,
        x: Float[Array, "b l d"],
        segments: Segments | None,
        state: RecurrentState,
        after: RecurrentState,
    ) -> tuple[Any, ...]:
        """Outputs, anything on padding, ``state`` after the last real token, and what the mixer
        gives to later blocks, if its config ``writes``.

        ``after`` is the state then but for ``state``. ``state.state`` is None where no token has
        been seen; ``state`` is to be None then too if it grows.
        """
        raise NotImplementedError

    def empty(self, batch_size: int, max_length: int | None, dtype: Any) -> Any:
        """``state`` before the first token."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: RecurrentState | None = None,
        deterministic: bool = True,
        share: bool = False,
    ) -> tuple[Any, ...]:
        """As ``Mixer`` has it; with ``share`` also what later blocks read."""
        self.check(x, segments, state)
        if state is None:
            state = RecurrentState.start(None, x.shape[0])
        elif state.state is None:
            raise ValueError(
                f"{self.config.mixer} mixer: state is of a call that was given none, so it holds "
                "no cache; begin with initial_state(batch_size, max_length=...)"
            )
        after = state.update(None, segments, x.shape[1])
        y, kept, *given = self.mix(x, segments, state, after)
        y = mask_padding(y, segments)
        left = dataclasses.replace(after, state=kept) if self.stateful else None
        return (y, left, *given) if share else (y, left)

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """An empty cache; ``dtype`` is that of its keys and values."""
        self.require_stateful("initial_state")
        return RecurrentState.start(self.empty(batch_size, max_length, dtype), batch_size)

    def require_length(self, max_length: int | None) -> int:
        """``max_length``, of which a growing cache has to know."""
        if max_length is None or max_length < 1:
            raise ValueError(
                f"{self.config.mixer} mixer: max_length={max_length} must be positive, the cache "
                "has room for so many tokens of a document"
            )
        if max_length >= 2**31:
            raise ValueError(
                f"{self.config.mixer} mixer: max_length={max_length} must be below 2**31, so many "
                "tokens of a document can be counted"
            )
        return max_length


class Heads(Mixer[Config]):
    """A mixer with ``SoftmaxConfig``: projections to heads and back."""

    @property
    def head_size(self) -> int:
        """K; ValueError where the width does not divide."""
        config = self.config
        if config.head_size is None and self.width % config.heads:
            raise ValueError(
                f"{config.mixer} mixer: heads={config.heads} must divide the width {self.width}; "
                "or set head_size"
            )
        return config.head_size or self.width // config.heads

    def project(
        self, x: Float[Array, "b l d"], features: int, name: str, use_bias: bool | None = None
    ) -> Array:
        """``x W (+ b)``, initialised as the configuration says."""
        init = nn.initializers.normal(self.config.init_std)
        bias = self.config.use_bias if use_bias is None else use_bias
        return dense(x, features, name, use_bias=bias, kernel_init=init)

    def tokens(
        self, x: Float[Array, "b l d"], positions: Int[Array, "b l"]
    ) -> tuple[Array, Array, Array]:
        """Queries ``(B, L, H, K)``, keys and values ``(B, L, G, K)``, normed and rotated."""
        config, size = self.config, self.head_size
        q, k, v = (
            split_heads(self.project(x, heads * size, name), size)
            for heads, name in (
                (config.heads, "q_proj"),
                (config.groups, "k_proj"),
                (config.groups, "v_proj"),
            )
        )
        if config.qk_norm:
            q, k = self.normed(q, "q_norm"), self.normed(k, "k_norm")
        q = self.scores_scaled(q)
        return self.rotate(q, positions), self.rotate(k, positions), v

    def normed(self, x: Float[Array, "b l h k"], name: str) -> Float[Array, "b l h k"]:
        """Each head over its root mean square, with a scale."""
        config = self.config
        norm = ZeroCenteredRMSNorm if config.zero_centered_norm else GatedNorm
        return norm(config.norm_epsilon, name=name)(x)

    def scores_scaled(self, q: Float[Array, "b l h k"]) -> Float[Array, "b l h k"]:
        """Queries such that scores over ``sqrt(K)`` are those over the scale asked for."""
        scale = self.config.score_scale
        return q if scale is None else q * (scale * self.head_size**0.5)

    def rotate(self, x: Float[Array, "b l h k"], positions: Int[Array, "b l"]) -> Array:
        """The rotary embedding, if the configuration wants one."""
        config = self.config
        if config.rotary_base is None:
            return x
        channels = round(self.head_size * config.rotary_fraction)
        return rotary(x, positions, config.rotary_base, channels)

    def output_projection(
        self, o: Float[Array, "b l h k"], x: Float[Array, "b l d"]
    ) -> Float[Array, "b l d"]:
        """Heads to channels, gated by the inputs ``x`` if the configuration says so."""
        y = merge_heads(o)
        if self.config.output_gate:
            y = y * jax.nn.sigmoid(self.project(x, y.shape[-1], "g_proj"))
        return self.project(y, self.width, "o_proj", self.config.use_out_bias)


class SoftmaxMixer(Heads[Config], CachingMixer[Config]):
    """A mixer of heads that caches keys and values."""


def all_segments(x: Array, segments: Segments | None) -> Int[Array, "b l"]:
    """Numbers of the documents along each row; 1 everywhere without segments."""
    return jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments.index


def held(state: RecurrentState, segments: Segments | None) -> Int[Array, " b"]:
    """Tokens of each row's first document that are behind the state; 0 before padding."""
    return state.positions(segments, 1)[:, 0]


def renewed(state: RecurrentState, segments: Segments | None) -> Bool[Array, " b"]:
    """Rows whose last document begins in this call."""
    if segments is None:
        return jnp.zeros(state.position.shape, bool)
    some = segments.ids[:, 0] != 0
    started = some & (segments.ids[:, 0] != state.segment)
    return started | (jnp.max(segments.index, axis=1) > 1)


def last_document(segments: Segments) -> Bool[Array, "b l"]:
    """The tokens of each row's last document."""
    return (segments.index == jnp.max(segments.index, axis=1, keepdims=True)) & segments.mask


def cleared(rows: Bool[Array, " b"], caches: Any) -> Any:
    """``caches (B, ..)`` with zeros in ``rows``; costs nothing where there are none."""

    def clear(caches: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x),
            caches,
        )

    return jax.lax.cond(jnp.any(rows), clear, lambda caches: caches, caches)


def write(
    cache: Float[Array, "b p *k"],
    x: Float[Array, "b l *k"],
    slots: Int[Array, "b l"],
    chosen: Bool[Array, "b l"],
) -> Float[Array, "b p *k"]:
    """``cache`` with the ``chosen`` of ``x`` in their ``slots``; those without one are dropped."""
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    slots = jnp.where(chosen, slots, cache.shape[1])
    return cache.at[rows, slots].set(x.astype(cache.dtype), mode="drop")


def overflow(y: Array, full: Bool[Array, "b l"]) -> Array:
    """NaN, rather than a wrong answer, for tokens behind what a cache has room for.

    Without any there is no NaN at all: `jax.debug_nans` stops at such tokens and nowhere else.
    """
    return jnp.where(full[:, :, None], jnp.nan, y)
