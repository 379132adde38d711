"""RAT: a gated recurrence inside chunks, softmax attention across them.

Wei et al., "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling",
2025, arXiv:2507.04416.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqmodels import ops
from seqmodels.layers.heads import log_of_uniform, merge_heads, split_heads
from seqmodels.layers.projections import dense
from seqmodels.layers.rotary import rotary
from seqmodels.mixers.base import Implementation, MixerConfig, ParamLabel, RecurrentState, Segments
from seqmodels.mixers.checkpoints import attend_checkpoints, beyond, empty_checkpoints
from seqmodels.mixers.published import Published
from seqmodels.mixers.softmax import CachingMixer, overflow
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class RATConfig(MixerConfig):
    """Configuration of a RAT layer; the defaults are the paper's.

    Attributes:
      chunk: tokens of a chunk; 1 is attention with gated keys and values.
      heads: H; the channels of values are divided among them.
      groups: heads of projected queries and keys, which divide H; head h takes group ``h mod G``.
      rotary_base: of the rotary embedding by a token's chunk; None for none.
      init_std: deviation of the projections' normal initialisation.
      implementation: of the kernels, see ``pallas_kernels.common.dispatch``; None for the fastest,
        "reference" for forward mode and second derivatives.
    """

    mixer: ClassVar[str] = "rat"

    chunk: Size = 16
    heads: Size = 16
    groups: Size = 2
    rotary_base: Positive | None = 1e4
    init_std: Positive = 0.02
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.groups:
            raise ValueError(f"RATConfig: groups={self.groups} must divide heads={self.heads}")

    def param_labels(self) -> dict[str, ParamLabel]:
        return {"gate_bias": ParamLabel(float32=True)}


RAT_1_3B = Published(width=2048, layers=24, config=RATConfig())
"""The 1.3B model with chunks of 16."""


class RAT(CachingMixer[RATConfig]):
    """``W_o (sigmoid(z_t) * softmax(q_t k~_s^T / sqrt(K)) v~_s)`` over ``s = t`` and chunks' ends.

    With ``f_t = sigmoid(g_t + b)``, inside a chunk and from zero at its start

        v~_t = f_t v~_{t-1} + (1 - f_t) v_t,   k~_t = f_t k~_{t-1} + (1 - f_t) k_t,

    all of them with ``width`` channels: the groups of ``k_t``, and of ``q_t``, are repeated until
    each head has one. ``q_t`` and ``k~_t`` are rotated by the number of the chunk. A token sees the
    last tokens of earlier chunks and itself. Chunks are counted from a document's start; the last
    may be shorter.

    The state's ``state``: ``"running"`` float32 ``(B, 2 width)``, ``v~`` and unrotated ``k~``, and
    the cache ``{"k", "v"}: (B, max_length / chunk, H, K)`` of chunks' ends.
    """

    @property
    def head_size(self) -> int:
        """K; ValueError where the width does not divide."""
        if self.width % self.config.heads:
            raise ValueError(
                f"rat mixer: heads={self.config.heads} must divide the width {self.width}"
            )
        return self.width // self.config.heads

    def mix(
        self,
        x: Float[Array, "b l d"],
        segments: Segments | None,
        state: RecurrentState,
        after: RecurrentState,
    ) -> tuple[Float[Array, "b l d"], Any]:
        config, width, size = self.config, self.width, self.head_size
        few = config.groups * size
        init = nn.initializers.normal(config.init_std)
        mixed = dense(x, 3 * width + 2 * few, "in_proj", kernel_init=init)
        ends = (width, 2 * width, 3 * width, 3 * width + few)
        z, v, gate, q, k = jnp.split(mixed, ends, axis=-1)
        bias = self.param("gate_bias", _memories(config.chunk), (width,), jnp.float32)
        forget = jax.nn.sigmoid(gate.astype(jnp.float32) + bias[None, None])

        positions = state.positions(segments, x.shape[1])
        repeats = (1, 1, config.heads // config.groups)
        before = state.state
        running = None
        if before is not None:
            recurrent = dataclasses.replace(state, state=before["running"])
            running = recurrent.reset_at_document_start(segments)
        streams = jnp.concatenate([v, jnp.tile(k, repeats)], axis=-1)
        streams, running = self.smooth(streams, forget, positions, running, segments)
        v, k = jnp.split(streams.astype(x.dtype), 2, axis=-1)
        q, k, v = (split_heads(part, size) for part in (jnp.tile(q, repeats), k, v))
        if config.rotary_base is not None:
            chunks = positions // config.chunk
            q, k = (rotary(part, chunks, config.rotary_base) for part in (q, k))
        caches = None if before is None else {name: before[name] for name in ("k", "v")}
        o, kept = attend_checkpoints(
            q,
            k,
            v,
            caches,
            interval=config.chunk,
            state=state,
            segments=segments,
            implementation=config.implementation,
        )
        o = jax.nn.sigmoid(z) * merge_heads(o)
        y = dense(o, width, "out_proj", kernel_init=init)
        y = overflow(y, beyond(positions, caches, config.chunk))
        return y, None if kept is None else {"running": running, **kept}

    def smooth(
        self,
        streams: Float[Array, "b l e"],
        forget: Float[Array, "b l d"],
        positions: Int[Array, "b l"],
        running: Float[Array, "b e"] | None,
        segments: Segments | None,
    ) -> tuple[Float[Array, "b l e"], Float[Array, "b e"]]:
        """The recurrence, float32: both streams, and what is running after the last real token."""
        # A decay of zero at a chunk's first token forgets all that is before it.
        keep = jnp.where((positions % self.config.chunk == 0)[:, :, None], 0.0, forget)
        decay = jnp.concatenate([keep, keep], axis=-1)
        fresh = 1.0 - jnp.concatenate([forget, forget], axis=-1)
        return ops.linear_scan(
            decay,
            fresh * streams.astype(jnp.float32),
            initial_state=running,
            segments=segments,
            implementation=self.config.implementation,
        )

    def empty(self, batch_size: int, max_length: int | None, dtype: Any) -> Any:
        config, length = self.config, self.require_length(max_length)
        caches = empty_checkpoints(
            batch_size, length, config.heads, self.head_size, config.chunk, dtype
        )
        return {"running": jnp.zeros((batch_size, 2 * self.width), jnp.float32), **caches}


def _memories(chunk: int) -> Any:
    """Initialiser: forget gates that keep ``u / (1 + u)``, ``u`` uniform in ``[1, chunk - 1)``."""
    return log_of_uniform(1.0, chunk - 1.0) if chunk > 1 else nn.initializers.zeros
