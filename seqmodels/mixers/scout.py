"""SCOUT: a local mixer compresses the past, sparse attention looks at what it left every n tokens.

Jafari et al., "SCOUT: Toward Sub-Quadratic Attention via Segment Compression for Optimized Utility
in Transformers", 2025, arXiv:2509.00935.
"""

import dataclasses
from typing import Any, ClassVar

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels.layers.heads import GatedNorm
from seqmodels.mixers.base import Implementation, MixerConfig, ParamLabel, RecurrentState, Segments
from seqmodels.mixers.checkpoints import attend_checkpoints, beyond, empty_checkpoints
from seqmodels.mixers.published import Published
from seqmodels.mixers.softmax import SoftmaxConfig, SoftmaxMixer, overflow
from seqmodels.ranges import Positive, Size


@dataclasses.dataclass(frozen=True)
class SCOUTConfig(SoftmaxConfig):
    """Configuration of a SCOUT layer.

    Attributes:
      interval: tokens from one checkpoint to the next.
      local: the mixer before the attention, such as a ``MambaConfig`` or ``SlidingWindowConfig``;
        None where the layout has it in a block of its own, which is the published layer:
        ``("mamba", "scout") * n``, with an MLP behind each.
      implementation: of the kernel, see ``pallas_kernels.common.dispatch``; None for the fastest,
        "reference" for forward mode and second derivatives.
    """

    mixer: ClassVar[str] = "scout"

    rotary_base: Positive | None = 1e6
    interval: Size = 10
    local: MixerConfig | None = None
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local is not None and not (self.local.causal and self.local.stateful):
            raise ValueError(
                f"SCOUTConfig: local={self.local} must be causal and carry a state; "
                "set bidirectional=False in it"
            )

    @property
    def supports_packing(self) -> bool:
        return self.local is None or self.local.supports_packing

    def param_labels(self) -> dict[str, ParamLabel]:
        local = {} if self.local is None else self.local.param_labels()
        return {f"local/{name}": label for name, label in local.items()}

    def param_axes(self) -> dict[str, PartitionSpec]:
        local = {} if self.local is None else self.local.param_axes()
        return {f"local/{name}": axes for name, axes in local.items()}


SCOUT_430M = Published(width=1024, layers=14, config=SCOUTConfig(heads=16))
"""The attention of the 430M model with Mamba."""

SCOUT_1_6B = Published(width=2048, layers=13, config=SCOUTConfig(heads=32))
"""The attention of the 1.59B model with Mamba."""


class SCOUT(SoftmaxMixer[SCOUTConfig]):
    """``W_o softmax(q_t k_s^T / sqrt(K)) v_s`` over ``s = t`` and checkpoints ``s < t``.

    Checkpoints are the positions ``interval - 1, 2 interval - 1, ..`` of a document. Nothing but
    the mixer before compresses what is between them. With ``local`` that mixer is part of this one,
    with the residual and norm that stand between them,

        u = local(x),   y = u + attention(RMSNorm(x + u)).

    The state's ``state``: the cache ``{"k", "v"}: (B, max_length / interval, G, K)`` of
    checkpoints, and ``"local"``, the state of the local mixer.
    """

    def mix(
        self,
        x: Float[Array, "b l d"],
        segments: Segments | None,
        state: RecurrentState,
        after: RecurrentState,
    ) -> tuple[Float[Array, "b l d"], Any]:
        config, entering = self.config, state.state
        local, local_state, attended = None, None, x
        if config.local is not None:
            before = None if entering is None else entering["local"]
            mixer = self._local(name="local")
            local, local_state = mixer(x, segments=segments, state=before)
            attended = GatedNorm(config.norm_epsilon, name="norm")(x + local)
        caches = None if entering is None else {name: entering[name] for name in ("k", "v")}
        y, kept = self._attend(attended, caches, segments, state)
        if local is not None:
            y = y + local
        if kept is None:
            return y, None
        return y, kept if config.local is None else {"local": local_state, **kept}

    def _attend(
        self,
        x: Float[Array, "b l d"],
        caches: dict[str, Array] | None,
        segments: Segments | None,
        state: RecurrentState,
    ) -> tuple[Float[Array, "b l d"], dict[str, Array] | None]:
        config = self.config
        positions = state.positions(segments, x.shape[1])
        q, k, v = self.tokens(x, positions)
        o, kept = attend_checkpoints(
            q,
            k,
            v,
            caches,
            interval=config.interval,
            state=state,
            segments=segments,
            implementation=config.implementation,
        )
        o = self.output_projection(o, x)
        return overflow(o, beyond(positions, caches, config.interval)), kept

    def _local(self, **module: Any) -> Any:
        from seqmodels.mixers import build  # the registry imports this module

        return build(self.config.local, self.width, **module)

    def empty(self, batch_size: int, max_length: int | None, dtype: Any) -> Any:
        config, length = self.config, self.require_length(max_length)
        caches: dict[str, Any] = empty_checkpoints(
            batch_size, length, config.groups, self.head_size, config.interval, dtype
        )
        if config.local is None:
            return caches
        local = self._local(parent=None)
        state = local.initial_state(batch_size, max_length=max_length, dtype=dtype)
        return {"local": state, **caches}
