"""The mixer contract: carried state, labels of parameters, the base classes."""

import dataclasses
from typing import Any, ClassVar, Generic, Literal, TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from seqmodels.arguments import segment_order
from seqmodels.layers.positions import further
from seqmodels.ranges import Checked
from seqmodels.segments import Segments as Segments
from seqmodels.segments import index_of as index_of
from seqmodels.segments import last_token as last_token
from seqmodels.segments import mask_padding as mask_padding

State = Any
"""What a mixer carries from call to call: a pytree; ``None`` where a mixer is not stateful."""


@dataclasses.dataclass(frozen=True)
class ParamLabel:
    """How the optimizer treats one parameter; a tree of them is optax's ``param_labels``.

    Attributes:
      group: name of the learning-rate group; "main" follows the global rate, "ssm" has its own.
      weight_decay: whether decoupled weight decay applies.
      float32: whether the parameter stays in float32 when the others are stored in bfloat16.
      trainable: whether training changes it at all.
    """

    group: str = "main"
    weight_decay: bool = True
    float32: bool = False
    trainable: bool = True


SSM_LABEL = ParamLabel(group="ssm", weight_decay=False, float32=True)
"""State-space parameters: their own learning rate, no weight decay."""

NO_DECAY_LABEL = ParamLabel(weight_decay=False, float32=True)
"""Decays, biases of steps and skip connections of selective and gated layers."""


@flax.struct.dataclass
class RecurrentState:
    """State of a recurrent mixer.

    Attributes:
      state: pytree of ``(B, ...)`` arrays, the recurrent state after the last real token.
      position: ``(B,)`` int32, tokens seen of the current document; from 2^31 on a negative
        number, see ``seqmodels.layers.positions``.
      segment: ``(B,)`` int32, id of the current document; 0 before the first token.
    """

    state: Any
    position: Any
    segment: Any

    @classmethod
    def start(cls, state: Any, batch_size: int) -> "RecurrentState":
        """The state before the first token, around an all-zero ``state``."""
        # Two arrays: one could not be donated twice.
        position, segment = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        return cls(state=state, position=position, segment=segment)

    def reset_at_document_start(self, segments: Segments | None) -> Any:
        """``state``, zeroed in the rows where a new document begins at the first token."""
        if segments is None:
            return self.state
        keep = ~self._starts(segments)

        def zero(part: Array) -> Array:
            return jnp.where(keep.reshape(-1, *(1,) * (part.ndim - 1)), part, jnp.zeros_like(part))

        return jax.tree.map(zero, self.state)

    def update(self, state: Any, segments: Segments | None, length: int) -> "RecurrentState":
        """The state after ``length`` more tokens that led to ``state``.

        Without segments the tokens continue the current document. A row of padding leaves
        position and segment as they are; the caller sees to ``state``.
        """
        if segments is None:
            position = further(self.position, jnp.full_like(self.position, length))
            return RecurrentState(state, position, jnp.maximum(self.segment, 1))
        lengths = segments.lengths
        last = jnp.maximum(lengths - 1, 0)[:, None]
        run, place, name = (
            jnp.take_along_axis(part, last, axis=1)[:, 0]
            for part in (segments.index, segments.positions, segments.ids)
        )
        before = jnp.where(run == 1, self._continued(segments), 0)
        some = lengths > 0
        return RecurrentState(
            state,
            jnp.where(some, further(before, place + 1), self.position),
            jnp.where(some, name, self.segment),
        )

    def positions(self, segments: Segments | None, length: int) -> Int[Array, "b l"]:
        """Positions of the next ``length`` tokens, each from the start of its document."""
        if segments is None:
            count = jnp.arange(length, dtype=jnp.int32)[None]
            return further(self.position[:, None], count)
        before = self._continued(segments)[:, None]
        return further(jnp.where(segments.index == 1, before, 0), segments.positions)

    def _continued(self, segments: Segments) -> Int[Array, " b"]:
        """Tokens of each row's first document that earlier calls have seen."""
        return jnp.where(self._starts(segments), 0, self.position)

    def _starts(self, segments: Segments) -> Bool[Array, " b"]:
        first = segments.ids[:, 0]
        return (first != 0) & (first != self.segment)


# So that a program with states, exported by `jax.export`, can be written to a file and read again.
export.register_pytree_node_serialization(
    RecurrentState,
    serialized_name="seqmodels.RecurrentState",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)


Implementation = Literal["reference", "xla", "tpu", "gpu"]
"""Implementation of a kernel, see ``pallas_kernels.common.dispatch``."""


@dataclasses.dataclass(frozen=True)
class MixerConfig(Checked):
    """Base of the mixers' configs.

    Attributes:
      mixer: the registered name.
      reads, writes: what it takes of an earlier block of the same backbone, and gives to later ones
        that read it, see ``seqmodels.mixers.shared``; None for nothing.
    """

    mixer: ClassVar[str]
    reads: ClassVar[str | None] = None
    writes: ClassVar[str | None] = None

    @property
    def causal(self) -> bool:
        """Whether output t depends on tokens up to t only."""
        return True

    @property
    def stateful(self) -> bool:
        """Whether the mixer takes and returns a state."""
        return True

    @property
    def supports_packing(self) -> bool:
        """Whether a row may hold several documents."""
        return True

    def at(self, layer: int, layers: int) -> "MixerConfig":
        """The config in block ``layer`` (from 0) of ``layers``: itself, unless depth matters."""
        del layer, layers
        return self

    def param_labels(self) -> dict[str, ParamLabel]:
        """Parameters (by name within the mixer) that the optimizer must treat specially."""
        return {}

    def param_axes(self) -> dict[str, PartitionSpec]:
        """Logical axes of the parameters (by name within the mixer) that are in no layer of
        ``seqmodels.parallel.parameters``."""
        return {}


@dataclasses.dataclass(frozen=True)
class BothSidesConfig(MixerConfig):
    """Base of the configs of mixers that see the whole row always, and carry no state."""

    @property
    def causal(self) -> bool:
        return False

    @property
    def stateful(self) -> bool:
        return False


def require_odd(config: MixerConfig, conv_size: int) -> None:
    """Raises ValueError unless a convolution around the token has an odd number of taps."""
    if conv_size % 2 == 0:
        raise ValueError(
            f"{type(config).__name__}: conv_size={conv_size} must be odd: the convolution looks as "
            "far ahead as back"
        )


Config = TypeVar("Config", bound=MixerConfig)


class Mixer(nn.Module, Generic[Config]):
    """A layer that mixes tokens along the length.

    One call serves training, chunked prefill (``state`` in, ``state`` out) and decoding
    (``L == 1``). Outputs are zero on padding. A state is carried across calls only within one
    document: where the first id of a row differs from the state's segment, the state is zeroed.
    """

    config: Any
    width: int

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: State = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], State]:
        """Returns outputs and the state after the last real token (None if it is not stateful).

        Raises:
          ValueError: ``x``, ``segments`` or ``state`` of a wrong shape, or a feature that this
            configuration declares absent.
        """
        raise NotImplementedError

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> State:
        """The state before the first token; ``dtype`` is that of cached activations, if any."""
        raise NotImplementedError

    def state_bytes(self, length: int) -> int:
        """Bytes of state that one row holds after ``length`` tokens."""
        state = jax.eval_shape(lambda: self.initial_state(1, max_length=length))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    @property
    def causal(self) -> bool:
        return self.config.causal

    @property
    def stateful(self) -> bool:
        return self.config.stateful

    @property
    def supports_packing(self) -> bool:
        return self.config.supports_packing

    def check(self, x: Array, segments: Segments | None, state: State) -> None:
        """Refuses bad arguments at trace time; see ``__call__``."""
        name = f"{self.config.mixer} mixer"
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(
                f"{name}: x has shape {x.shape}, expected (batch, length, {self.width}); "
                f"set width={x.shape[-1]} or change the input"
            )
        if segments is not None and segments.ids.shape != x.shape[:2]:
            raise ValueError(
                f"{name}: segments.ids has shape {segments.ids.shape}, expected {x.shape[:2]}, "
                "the batch and length of x"
            )
        if segments is not None:
            segment_order(segments.ids, segments.single)
        if segments is not None and not self.supports_packing and not segments.single:
            raise ValueError(
                f"{name}: segments with several documents a row are not supported; put one "
                "document in a row and build Segments.from_ids(ids, single=True)"
            )
        if state is not None:
            self.require_stateful("state")
            if state.segment.shape != x.shape[:1]:
                raise ValueError(
                    f"{name}: state is for a batch of {state.segment.shape[0]}, x has "
                    f"{x.shape[0]} rows; take initial_state({x.shape[0]})"
                )

    def enter(
        self, x: Array, segments: Segments | None, state: State
    ) -> tuple[RecurrentState, Any]:
        """Checks a call; its state, by default that before the first token, and the state's arrays,
        zeroed in rows that begin another document."""
        self.check(x, segments, state)
        if state is None:
            state = self.initial_state(x.shape[0], dtype=x.dtype)
        return state, state.reset_at_document_start(segments)

    def require_stateful(self, argument: str) -> None:
        """Refuses ``argument`` where the configuration carries no state."""
        if not self.stateful:
            raise ValueError(
                f"{self.config.mixer} mixer: {argument} is refused, a bidirectional mixer sees the "
                "whole sequence and carries no state; set bidirectional=False to stream"
            )
