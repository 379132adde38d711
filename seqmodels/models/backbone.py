"""A residual stack of mixer blocks, scanned over the repeated period of its layout."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqmodels.arguments import segment_order
from seqmodels.layers.dropout import Dropout
from seqmodels.layers.experts import GATED, Experts, ExpertsConfig, activated
from seqmodels.layers.gates import Gate, GateKind
from seqmodels.layers.monarch import BLOCKS, BlockDense
from seqmodels.layers.norms import Norm, NormKind
from seqmodels.layers.projections import scaled
from seqmodels.mixers import MixerConfig, ParamLabel, Segments, State, build
from seqmodels.mixers.base import NO_DECAY_LABEL
from seqmodels.parallel.mesh import in_tiles, split_tokens
from seqmodels.parallel.parameters import layer_axes
from seqmodels.ranges import Checked, Count, Positive, Share, Size

Remat = Literal["none", "dots", "full", "offload"]
MLPKind = Literal["gelu", "relu2", "swiglu", "geglu"]
SINGLE = ("mlp", "experts")
"""Names in a layout of blocks without a mixer, where each block has a single branch."""


@dataclasses.dataclass(frozen=True)
class BackboneConfig(Checked):
    """Configuration of a backbone.

    Attributes:
      layout: names of the mixers from the first block to the last, e.g. ``("s5",) * 8``.
      mixers: one config for each name in ``layout``. One that reads what an earlier block gives
        ("gmu", "cross_attention") reads the nearest before it that gives such; blocks are not
        scanned over then.
      names: the names of ``mixers`` in ``layout``; () for those that they are registered by.
      single: each block has one branch, not two: its mixer or, where ``layout`` says "mlp" or
        "experts", that (Nemotron-H).
      width: channels of the residual stream.
      norm: "batch" (padding ignored), "layer", "rms" or "zero_centered_rms".
      norm_epsilon: added to a norm's variance or mean square; None for the kind's usual one.
      prenorm: normalise the input of each branch rather than the sum after it.
      float32_residual: the sums along the residual stream are float32 whatever the inputs' dtype;
        needs ``prenorm``.
      residual_scale: what a branch is multiplied by before it is added (Granite).
      final_norm: one more norm after the last block.
      gate: what follows the mixer, see ``seqmodels.layers.gates.Gate``; None for nothing.
      dropout: rate of the dropout in the branches, one mask for all time steps.
      mlp: None, or the width of the hidden layer of a position-wise MLP over ``width``.
      mlp_kind: of its activation: "gelu" ``W_2 gelu(W_1 x)``; "relu2" with the square of what is
        positive in place of gelu; with a third matrix "swiglu"
        ``W_2 (silu(W_g x) * W_1 x)`` and "geglu", the same with gelu; gelu in the tanh form.
      mlp_bias: biases in the MLP.
      mlp_blocks: the MLP's matrices are block-diagonal, of so many blocks (M2-BERT).
      mlp_scales: what the activation's inputs and the outputs are multiplied by (Falcon-H1).
      experts: None, or a mixture of experts of ``mlp_kind`` in the MLP's place.
      dense_blocks: numbers of the blocks that have the MLP all the same.
      batchnorm_momentum: share of the old running statistics that each step keeps.
      decay_vectors: weight decay on biases and norm scales too, as the S4 and S5 recipes do.
      mlp_tile: None, or tokens of a row, on each device, whose hidden layer of the MLP exists at a
        time; backward computes it again.
      remat: what the backward pass recomputes: "none"; "dots", all but matmuls; "full", all but the
        residual stream between blocks; "offload", the same with that stream in the host's memory.
      scan_layers: compile one period of the layout and loop over it; compiles faster.
    """

    layout: tuple[str, ...]
    mixers: tuple[MixerConfig, ...]
    width: Size
    names: tuple[str, ...] = ()
    single: bool = False
    norm: NormKind = "layer"
    norm_epsilon: Positive | None = None
    prenorm: bool = True
    float32_residual: bool = False
    residual_scale: Positive = 1.0
    final_norm: bool = False
    gate: GateKind | None = None
    dropout: Share = 0.0
    mlp: Size | None = None
    mlp_kind: MLPKind = "gelu"
    mlp_bias: bool = True
    mlp_blocks: Size = 1
    mlp_scales: tuple[Positive, Positive] = (1.0, 1.0)
    experts: ExpertsConfig | None = None
    dense_blocks: tuple[Count, ...] = ()
    batchnorm_momentum: Share = 0.95
    decay_vectors: bool = True
    mlp_tile: Size | None = None
    remat: Remat = "none"
    scan_layers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names = list(self.names or (config.mixer for config in self.mixers))
        if len(names) != len(self.mixers):
            raise ValueError(
                f"BackboneConfig: names={self.names} must have one for each of {len(self.mixers)} "
                "mixers, or none"
            )
        mixed = set(self.layout) - set(SINGLE if self.single else ())
        if not self.layout or mixed != set(names) or len(names) != len(set(names)):
            raise ValueError(
                f"BackboneConfig: layout={self.layout} must name every config in mixers exactly, "
                f"one config a name; they are {names}; several configs of one mixer need names"
            )
        self._check_experts()
        for layer in range(len(self.layout)):
            self.source(layer)
        if self.mlp is not None and (self.mlp % self.mlp_blocks or self.width % self.mlp_blocks):
            raise ValueError(
                f"BackboneConfig: mlp_blocks={self.mlp_blocks} must divide width={self.width} and "
                f"mlp={self.mlp}"
            )
        if self.mlp_tile is not None and self.mlp is None:
            raise ValueError(
                f"BackboneConfig: mlp_tile={self.mlp_tile} needs an MLP; set mlp, or mlp_tile=None"
            )
        if self.float32_residual and not self.prenorm:
            raise ValueError(
                "BackboneConfig: float32_residual=True needs prenorm=True: a norm after the sum "
                "leaves no sum to keep"
            )

    def _check_experts(self) -> None:
        if self.experts is not None and self.mlp_tile is not None:
            raise ValueError(f"BackboneConfig: experts need mlp_tile=None, not {self.mlp_tile}")
        if self.single:
            for name in SINGLE:
                value = getattr(self, name)
                if (name in self.layout) != (value is not None):
                    raise ValueError(
                        f"BackboneConfig: with single=True {name}={value} needs a block {name!r} "
                        f"in layout={self.layout}, and the other way round"
                    )
            if self.dense_blocks:
                raise ValueError(
                    f"BackboneConfig: with single=True layout says which blocks have experts, not "
                    f"dense_blocks={self.dense_blocks}"
                )
            return
        if self.experts is None:
            if self.dense_blocks:
                raise ValueError(
                    f"BackboneConfig: dense_blocks={self.dense_blocks} are those without experts; "
                    "set experts, or dense_blocks=()"
                )
            return
        if any(block >= len(self.layout) for block in self.dense_blocks):
            raise ValueError(
                f"BackboneConfig: dense_blocks={self.dense_blocks} must be below the number of "
                f"blocks, {len(self.layout)}"
            )
        if (self.mlp is None) == bool(self.dense_blocks):
            raise ValueError(
                f"BackboneConfig: mlp={self.mlp} is that of dense_blocks={self.dense_blocks}; give "
                "both, or none where all blocks have experts"
            )

    def second(self, layer: int) -> Literal["mlp", "experts"] | None:
        """What block ``layer`` has beside a mixer, or in its place."""
        if self.single:
            return self.layout[layer] if self.layout[layer] in SINGLE else None  # type: ignore[return-value]
        if self.experts is not None and layer not in self.dense_blocks:
            return "experts"
        return None if self.mlp is None else "mlp"

    def mixer(self, layer: int) -> MixerConfig | None:
        """The mixer's config of block ``layer``, told its depth; None for a block without one."""
        names = self.names or tuple(config.mixer for config in self.mixers)
        found = dict(zip(names, self.mixers, strict=True)).get(self.layout[layer])
        return None if found is None else found.at(layer, len(self.layout))

    def source(self, layer: int) -> int | None:
        """The block whose memory or keys block ``layer`` reads; None for one that reads nothing.

        Raises:
          ValueError: no block before it gives them.
        """
        mixer = self.mixer(layer)
        if mixer is None or mixer.reads is None:
            return None
        for earlier in reversed(range(layer)):
            found = self.mixer(earlier)
            if found is not None and found.writes == mixer.reads:
                return earlier
        raise ValueError(
            f"BackboneConfig: block {layer}, {self.layout[layer]!r}, reads the {mixer.reads} of an "
            "earlier block, and none gives them; put mamba before gmu, attention before "
            "cross_attention"
        )

    @property
    def sources(self) -> frozenset[int]:
        """The blocks that others read."""
        found = (self.source(layer) for layer in range(len(self.layout)))
        return frozenset(layer for layer in found if layer is not None)

    def each_mixer(self) -> list[MixerConfig]:
        """``mixer`` of the blocks that have one, in order."""
        found = (self.mixer(layer) for layer in range(len(self.layout)))
        return [mixer for mixer in found if mixer is not None]

    @property
    def period(self) -> int:
        """Length of the shortest pattern of blocks that, repeated and cut, gives the layout.

        Mixers that differ by depth (decays of lightning, bounds of hgrn2) do not repeat.
        """
        blocks = [(self.mixer(layer), self.second(layer)) for layer in range(len(self.layout))]
        return next(
            p
            for p in range(1, len(blocks) + 1)
            if all(block == blocks[i % p] for i, block in enumerate(blocks))
        )

    @property
    def repeats(self) -> int:
        """Whole periods that are scanned over; 0 where all blocks are unrolled."""
        repeats = len(self.layout) // self.period
        return repeats if self.scan_layers and repeats > 1 and not self.sources else 0


RESIDUAL = "residual"
"""The `checkpoint_name` of what enters a block."""


class Block(nn.Module):
    """Norm, mixer, gate, residual; norm, MLP or experts, residual; one of both or both.

    Branches have ``dtype``. Beside outputs and state it returns what later blocks read, if
    ``shares``; ``shared`` is what an earlier one has given.
    """

    config: BackboneConfig
    mixer: MixerConfig | None
    second: Literal["mlp", "experts"] | None
    deterministic: bool
    dtype: Any
    shares: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        segments: Segments | None,
        state: State,
        shared: Any = None,
    ) -> tuple[Float[Array, "b l d"], State, Any]:
        config = self.config
        given = None

        def mix(y: Array) -> tuple[Array, tuple[State, Any]]:
            assert self.mixer is not None
            options: dict[str, Any] = {"share": True} if self.shares else {}
            options |= {} if self.mixer.reads is None else {"shared": shared}
            result: tuple[Any, ...] = build(self.mixer, config.width, name="mixer")(
                y, segments=segments, state=state, deterministic=self.deterministic, **options
            )
            y, after = result[:2]
            if config.gate is not None:
                y = Gate(config.gate, config.dropout, self.deterministic, name="gate")(y)
            return y, (after, result[2] if self.shares else None)

        def hidden_layer(block: nn.Module, y: Array) -> Array:
            def dense(y: Array, features: int, name: str) -> Array:
                if config.mlp_blocks > 1:
                    return BlockDense(features, config.mlp_blocks, config.mlp_bias, name=name)(y)
                return nn.Dense(features, config.mlp_bias, name=name, dtype=y.dtype)(y)

            first, last = config.mlp_scales
            activates = "mlp_gate" if config.mlp_kind in GATED else "mlp_in"

            def project(name: str) -> Array:
                return scaled(dense(y, config.mlp or 0, name), first if name == activates else 1.0)

            hidden = activated(project, "mlp_gate", "mlp_in", config.mlp_kind)
            return scaled(dense(hidden, config.width, "mlp_out"), last)

        def mlp(y: Array) -> tuple[Array, None]:
            y = hidden_layer(self, y) if config.mlp_tile is None else tiled(y, config.mlp_tile)
            return Dropout(config.dropout, self.deterministic)(y), None

        def experts(y: Array) -> tuple[Array, None]:
            mask = None if segments is None else segments.mask
            y = Experts(config.experts, config.mlp_kind, name="experts")(y, mask)  # type: ignore[arg-type]
            return Dropout(config.dropout, self.deterministic)(y), None

        def tiled(y: Array, tile: int) -> Array:
            run = nn.scan(
                nn.remat(lambda block, _, part: (None, hidden_layer(block, part))),
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            parts, join = in_tiles(y, tile)
            return join(run(self, None, parts)[1])

        x = checkpoint_name(x, RESIDUAL)
        if self.mixer is not None:
            x, (state, given) = self._residual(x, segments, "norm", mix)
        if self.second is not None:
            branch = mlp if self.second == "mlp" else experts
            x, _ = self._residual(x, segments, "mlp_norm", branch)
        return x, state, given

    def _residual(
        self, x: Array, segments: Segments | None, name: str, branch: Any
    ) -> tuple[Array, Any]:
        norm = make_norm(self.config, name)
        mask = None if segments is None else segments.mask
        y = norm(x, mask, deterministic=self.deterministic) if self.config.prenorm else x
        y, more = branch(y.astype(self.dtype))
        y = scaled(y, self.config.residual_scale)
        x = split_tokens(x + y.astype(x.dtype))
        if not self.config.prenorm:
            x = norm(x, mask, deterministic=self.deterministic)
        return x, more


class Period(nn.Module):
    """The blocks of one period; the body of the scan over layers."""

    config: BackboneConfig
    deterministic: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, states: tuple[State, ...], segments: Segments | None
    ) -> tuple[Array, tuple[State, ...]]:
        after = []
        for layer in range(self.config.period):
            block = make_block(self.config, layer, self.deterministic, self.dtype, scanned=True)
            x, state, _ = block(x, segments, states[layer])
            after.append(state)
        return x, tuple(after)


class Backbone(nn.Module):
    """Blocks in the order of ``config.layout``, states passed through.

    Parameters of block i are under ``block_i``; with ``scan_layers`` those of the repeated period
    are under ``period/block_j`` with a leading axis of repeats, and only the remainder is under
    ``block_i``. ``stack_layers`` and ``unstack_layers`` convert.
    """

    config: BackboneConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segments: Segments | None = None,
        state: tuple[State, ...] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "b l d"], tuple[State, ...]]:
        """Returns outputs ``(B, L, width)`` and one state for each block.

        Raises:
          ValueError: bad arguments of a mixer, or not one state for each block.
        """
        config, layers = self.config, len(self.config.layout)
        states = (None,) * layers if state is None else tuple(state)
        if len(states) != layers:
            raise ValueError(f"state has {len(states)} entries, expected one a block: {layers}")
        if segments is not None:
            segment_order(segments.ids, segments.single)  # blocks under a scan see traced ids
        dtype = x.dtype
        x = split_tokens(x)
        x = x.astype(jnp.float32) if config.float32_residual else x
        after: list[State] = []
        scanned = config.repeats * config.period
        if scanned:
            x, parts = nn.scan(
                Period,
                variable_axes={"params": 0, "batch_stats": 0, "losses": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=config.repeats,
            )(
                config, deterministic, dtype, name="period"
            )(x, _interleaved_stack(states[:scanned], config.period), segments)
            after += _interleaved_unstack(parts, config.repeats)
        given: dict[int | None, Any] = {}
        for layer in range(scanned, layers):
            block = make_block(config, layer, deterministic, dtype)
            shared = given.get(config.source(layer))
            x, part, given[layer] = block(x, segments, states[layer], shared)
            after.append(part)
        if config.final_norm:
            mask = None if segments is None else segments.mask
            x = make_norm(config, "final_norm")(x, mask, deterministic=deterministic)
        return x.astype(dtype), tuple(after)

    def initial_state(
        self, batch_size: int, *, max_length: int | None = None, dtype: Any = jnp.bfloat16
    ) -> tuple[State, ...]:
        """One state for each block, before the first token; None for one that carries none."""

        def start(mixer: MixerConfig | None) -> State:
            if mixer is None:
                return None
            built = build(mixer, self.config.width, parent=None)
            return built.initial_state(batch_size, max_length=max_length, dtype=dtype)

        return tuple(start(self.config.mixer(layer)) for layer in range(len(self.config.layout)))


def make_block(
    config: BackboneConfig, layer: int, deterministic: bool, dtype: Any, *, scanned: bool = False
) -> nn.Module:
    """Block ``layer`` under the config's remat policy.

    Outside of a loop XLA would see that what is computed again was there before, and keep it; on
    CPUs it does so all the same.
    """
    policies = {
        "dots": jax.checkpoint_policies.dots_saveable,
        "full": None,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[RESIDUAL],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    kind: Any = Block
    if config.remat != "none":
        kind = nn.remat(Block, policy=policies[config.remat], prevent_cse=not scanned)
    mixer, second, shares = config.mixer(layer), config.second(layer), layer in config.sources
    return kind(config, mixer, second, deterministic, dtype, shares, name=f"block_{layer}")


def make_norm(config: BackboneConfig, name: str) -> Norm:
    """The norm that the config asks for."""
    return Norm(config.norm, config.batchnorm_momentum, config.norm_epsilon, name=name)


def param_labels(config: BackboneConfig, params: Mapping[str, Any]) -> Any:
    """How the optimizer treats each parameter: a tree like ``params`` of ``ParamLabel``.

    ``params`` is any tree that holds a backbone's parameters, scanned or not, e.g. a model's.
    Mixers label their own; norms stay float32; the rest is "main" with weight decay.
    """

    def label(path: tuple[Any, ...], leaf: Any) -> ParamLabel:
        keys = [entry.key for entry in path]
        if "mixer" in keys:
            at = keys.index("mixer")
            mixer = config.mixer(int(keys[at - 1].removeprefix("block_")))
            assert mixer is not None
            own = mixer.param_labels().get("/".join(keys[at + 1 :]))
            if own is not None:
                return own
        norm = any(key.endswith("norm") for key in keys)
        if keys[-1] == "correction_bias":
            return NO_DECAY_LABEL  # which experts are chosen has no gradient
        vector = norm or keys[-1] == "bias"
        return ParamLabel(weight_decay=config.decay_vectors or not vector, float32=norm)

    return jax.tree_util.tree_map_with_path(label, params)


def param_axes(config: BackboneConfig, params: Mapping[str, Any]) -> Any:
    """Logical axes of each parameter: a tree like ``params`` of ``PartitionSpec``.

    ``params`` is as in ``param_labels``. Names are those of ``seqmodels.parallel.parameters``, and
    "layers" of the axis that a scan over layers goes over.
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        keys = [entry.key for entry in path]
        names = layer_axes(keys)
        if "mixer" in keys:
            at = keys.index("mixer")
            mixer = config.mixer(int(keys[at - 1].removeprefix("block_")))
            assert mixer is not None
            names = mixer.param_axes().get("/".join(keys[at + 1 :]), names)
        elif config.mlp_blocks > 1 and keys[-2].startswith("mlp_") and keys[-1] == "kernel":
            names = BLOCKS
        return PartitionSpec("layers", *names) if "period" in keys else names

    return jax.tree_util.tree_map_with_path(axes, params)


def stack_layers(config: BackboneConfig, collection: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's collection ("params", "batch_stats"), ``scan_layers`` off -> on.

    ``collection`` is the backbone's own subtree; entries other than blocks are kept.
    """
    config = dataclasses.replace(config, scan_layers=True)
    scanned = config.repeats * config.period
    result = dict(collection)
    if not scanned:
        return result
    blocks = tuple(result.pop(f"block_{layer}") for layer in range(scanned))
    parts = _interleaved_stack(blocks, config.period)
    result["period"] = {f"block_{j}": part for j, part in enumerate(parts)}
    return result


def unstack_layers(config: BackboneConfig, collection: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``stack_layers``."""
    config = dataclasses.replace(config, scan_layers=True)
    result = dict(collection)
    if not config.repeats:
        return result
    period = result.pop("period")
    parts = tuple(period[f"block_{j}"] for j in range(config.period))
    blocks = _interleaved_unstack(parts, config.repeats)
    return result | {f"block_{layer}": block for layer, block in enumerate(blocks)}


def _interleaved_stack(trees: tuple[Any, ...], period: int) -> tuple[Any, ...]:
    """Trees of layers 0, 1, .. -> for each place in the period, its layers stacked."""
    return tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees[place::period])
        for place in range(period)
    )


def _interleaved_unstack(parts: tuple[Any, ...], repeats: int) -> list[Any]:
    """The inverse of ``_interleaved_stack``."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], part) for i in range(repeats) for part in parts]
