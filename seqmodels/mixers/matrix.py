"""What mixers share whose heads each keep a matrix: sizes, state, calls of the kernels."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqmodels import ops
from seqmodels.layers.heads import GatedNorm, l2_normalise, merge_heads, split_heads
from seqmodels.layers.projections import dense
from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.mixers.base import (
    Implementation,
    Mixer,
    MixerConfig,
    RecurrentState,
    Segments,
    mask_padding,
)
from seqmodels.ranges import Positive, Size

WIDEST = 256
"""Widest values of one head that the kernels take; wider ones run as several heads."""


@dataclasses.dataclass(frozen=True)
class MatrixConfig(MixerConfig):
    """Configuration that all mixers with matrix states have.

    Attributes:
      init_std: deviation of the projections' normal initialisation.
      norm_epsilon: added to the mean square in the norm of the outputs.
      implementation: of the kernel, see ``pallas_kernels.common.dispatch``; None for the fastest,
        "reference" for forward mode and second derivatives.
    """

    init_std: Positive = 0.02
    norm_epsilon: Positive = 1e-5
    implementation: Implementation | None = None


def check_layer(config: Any) -> None:
    """Raises ValueError unless ``layer < layers``."""
    if config.layer >= config.layers:
        raise ValueError(
            f"{type(config).__name__}: layer={config.layer} must be in [0, layers={config.layers})"
        )


class Sizes(NamedTuple):
    """Heads of queries and keys, heads of values and their widths: G, H, K, V."""

    groups: int
    heads: int
    key: int
    value: int


class QKV(NamedTuple):
    """Queries and keys ``(B, L, G, K)``, values ``(B, L, H, V)``."""

    q: Array
    k: Array
    v: Array


Config = TypeVar("Config", bound=MatrixConfig)


class MatrixMixer(Mixer[Config]):
    """A mixer whose heads each keep a matrix ``(K, V)``.

    ``state`` of the state is a dict: ``"recurrent_state"`` float32 ``(B, H', K, V')``, one
    matrix a head, where a head of values wider than 256 is stored as several (see ``pieces``), and
    what the mixer adds to it. Subclasses say their ``sizes`` and write ``mix``.
    """

    @property
    def sizes(self) -> Sizes:
        """Raises ValueError where the width does not divide as the configuration says."""
        raise NotImplementedError

    def mix(
        self, x: Float[Array, "b l d"], segments: Segments | None, state: RecurrentState
    ) -> tuple[Float[Array, "b l d"], dict[str, Array]]:
        """Outputs, anything on padding, and ``state`` after the last real token."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: RecurrentState | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], RecurrentState]:
        self.check(x, segments, state)
        if state is None:
            state = self.initial_state(x.shape[0], dtype=x.dtype)
        y, after = self.mix(x, segments, state)
        return mask_padding(y, segments), state.update(after, segments, x.shape[1])

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        """Zeros; ``dtype`` is that of convolutions' windows, ``max_length`` is unused."""
        sizes = self.sizes
        split = pieces(sizes.value)
        shape = (batch_size, sizes.heads * split, sizes.key, sizes.value // split)
        return RecurrentState.start({"recurrent_state": jnp.zeros(shape, jnp.float32)}, batch_size)

    def project(
        self, x: Float[Array, "b l d"], features: int, name: str
    ) -> Float[Array, "b l features"]:
        """A projection without bias, initialised as the configuration says."""
        init = nn.initializers.normal(self.config.init_std)
        return dense(x, features, name, kernel_init=init)

    def tokens(self, x: Float[Array, "b l d"]) -> QKV:
        """Queries, keys and values as linear functions of ``x``."""
        sizes = self.sizes
        return QKV(
            split_heads(self.project(x, sizes.groups * sizes.key, "q_proj"), sizes.key),
            split_heads(self.project(x, sizes.groups * sizes.key, "k_proj"), sizes.key),
            split_heads(self.project(x, sizes.heads * sizes.value, "v_proj"), sizes.value),
        )

    def linear_attention(
        self,
        tokens: QKV,
        log_decay: Float[np.ndarray, " h"] | Float[Array, "b l h *k"] | None,
        initial_state: Float[Array, "b hp k vp"],
        segments: Segments | None,
        *,
        scale: float | None = None,
    ) -> tuple[Float[Array, "b l h v"], Float[Array, "b hp k vp"]]:
        """Outputs of ``ops.linear_attention``, and the state after each row's last real token.

        Decays ``(H,)`` are constants; the others belong to tokens.
        """
        split = pieces(tokens.v.shape[-1])
        o, final_state = ops.linear_attention(
            *_folded(tokens, split),
            _spread(log_decay, split),
            scale=scale,
            initial_state=initial_state,
            segments=segments,
            implementation=self.config.implementation,
        )
        return o.reshape(tokens.v.shape), final_state

    def delta_rule(
        self,
        tokens: QKV,
        beta: Float[Array, "b l h"],
        log_decay: Float[Array, "b l h *k"] | None,
        initial_state: Float[Array, "b hp k vp"],
        segments: Segments | None,
    ) -> tuple[Float[Array, "b l h v"], Float[Array, "b hp k vp"]]:
        """Outputs of ``ops.delta_rule``, and the state after each row's last real token."""
        split = pieces(tokens.v.shape[-1])
        o, final_state = ops.delta_rule(
            *_folded(tokens, split),
            _spread(beta, split),
            _spread(log_decay, split),
            initial_state=initial_state,
            segments=segments,
            implementation=self.config.implementation,
        )
        return o.reshape(tokens.v.shape), final_state

    def output_projection(
        self,
        o: Float[Array, "b l h v"],
        gate: Float[Array, "b l n"] | None = None,
        activation: Callable[[Array], Array] = jax.nn.silu,
        *,
        per_head: bool = True,
    ) -> Float[Array, "b l d"]:
        """``W_o (RMSNorm(o) * activation(gate))``, normed per head with one scale, or all heads."""
        gate = gate if gate is None or not per_head else split_heads(gate, o.shape[-1])
        norm = GatedNorm(self.config.norm_epsilon, activation, name="o_norm")
        o = merge_heads(norm(o, gate)) if per_head else norm(merge_heads(o), gate)
        return self.project(o, self.width, "o_proj")

    def per_head(self, total: float, heads: int, name: str) -> int:
        """``total / heads`` channels; ValueError unless that is a whole number."""
        size = round(total / heads)
        if size < 1 or abs(size * heads - total) > 1e-6:
            raise ValueError(
                f"{self.config.mixer} mixer: {name} of {total:g} channels (width {self.width}) "
                f"must divide into heads={heads}; change heads or the expansion"
            )
        return size


@dataclasses.dataclass(frozen=True)
class DeltaConfig(MatrixConfig):
    """Configuration that all delta rules have.

    Attributes:
      conv_size: of the short convolutions over queries, keys and values.
      negative_eigenvalues: doubles beta, so that the state may change sign along a key (Grazzi et
        al., "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", 2024).
    """

    conv_size: Size = 4
    negative_eigenvalues: bool = False


AnyDelta = TypeVar("AnyDelta", bound=DeltaConfig)


class DeltaMixer(MatrixMixer[AnyDelta]):
    """A mixer whose matrices follow a delta rule.

    ``state`` also holds the windows of the convolutions, ``"q_window"``, ``"k_window"`` and
    ``"v_window"``, ``(B, W - 1, channels)``.
    """

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> RecurrentState:
        start = super().initial_state(batch_size).state
        for name, width in self._channels().items():
            start[f"{name}_window"] = start_window(batch_size, self.config.conv_size, width, dtype)
        return RecurrentState.start(start, batch_size)

    def convolved(
        self, x: Float[Array, "b l d"], entering: dict[str, Array], segments: Segments | None
    ) -> tuple[QKV, dict[str, Array]]:
        """``silu`` of short convolutions, queries and keys of norm 1; the windows after them."""
        windows, parts = {}, {}
        for name, channels in self._channels().items():
            part = self.project(x, channels, f"{name}_proj")
            conv = ShortConv(self.config.conv_size, use_bias=False, name=f"{name}_conv")
            window = f"{name}_window"
            parts[name], windows[window] = conv(part, entering[window], segments=segments)
        sizes = self.sizes
        q, k = (l2_normalise(split_heads(parts[name], sizes.key)) for name in "qk")
        return QKV(q, k, split_heads(parts["v"], sizes.value)), windows

    def beta(self, x: Float[Array, "b l d"]) -> Float[Array, "b l h"]:
        """How much of the old value each head replaces: in (0, 1), or in (0, 2)."""
        logits = self.project(x.astype(jnp.float32), self.sizes.heads, "b_proj")
        return jax.nn.sigmoid(logits) * (2.0 if self.config.negative_eigenvalues else 1.0)

    def _channels(self) -> dict[str, int]:
        sizes = self.sizes
        keys = sizes.groups * sizes.key
        return {"q": keys, "k": keys, "v": sizes.heads * sizes.value}


def pieces(value: int) -> int:
    """Heads of at most 256 values, all equally wide, that one head of ``value`` values runs as."""
    return next(n for n in range(1, value + 1) if value % n == 0 and value // n <= WIDEST)


def _folded(tokens: QKV, split: int) -> QKV:
    batch, length, heads, value = tokens.v.shape
    return tokens._replace(v=tokens.v.reshape(batch, length, heads * split, value // split))


def _spread(x: Any, split: int) -> Any:
    """What belongs to a head, ``(H,)`` or ``(B, L, H, ..)``, once for each of its pieces."""
    if x is None or split == 1:
        return x
    return np.repeat(x, split) if isinstance(x, np.ndarray) else jnp.repeat(x, split, axis=2)
