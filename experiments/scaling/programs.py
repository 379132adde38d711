"""One block with its length split over absent TPUs, as its compiler sees it."""

import dataclasses
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.scaling.collectives import collectives
from pallas_kernels.tools import aot
from seqmodels.mixers import MixerConfig
from seqmodels.mixers.attention import AttentionConfig
from seqmodels.mixers.gated_deltanet import GatedDeltaNetConfig
from seqmodels.mixers.gla import GLAConfig
from seqmodels.mixers.rat import RATConfig
from seqmodels.mixers.s4 import S4Config
from seqmodels.mixers.sliding_window import SlidingWindowConfig
from seqmodels.models import Backbone, BackboneConfig
from seqmodels.parallel import make_mesh, on_mesh

WIDTH = 1024
"""Channels of the residual stream."""


class Exchange(NamedTuple):
    """A way in which shards of a row tell each other what they know.

    Attributes:
      mixer: the block's.
      op: of ``seqmodels.parallel.STRATEGIES``; None where there is no choice.
      strategy: which of them.
      recurrent: whether it carries states, so that its exchange must not grow with the length.
    """

    mixer: MixerConfig
    op: str | None = None
    strategy: str | None = None
    recurrent: bool = False


_GLA = GLAConfig()  # 4 heads of 128 keys and 256 values at this width
_ATTENTION = AttentionConfig(heads=8)
EXCHANGES = {
    "all_gather": Exchange(_GLA, "linear_attention", "all_gather", True),
    "doubling": Exchange(_GLA, "linear_attention", "doubling", True),
    "chain": Exchange(_GLA, "linear_attention", "chain", True),
    "affine": Exchange(GatedDeltaNetConfig(heads=4, head_size=128), "delta_rule", "doubling", True),
    "halo": Exchange(SlidingWindowConfig(heads=8, window=1024), "sliding_window", "halo"),
    "checkpoints": Exchange(RATConfig(heads=8)),
    "ring": Exchange(_ATTENTION, "attention", "ring"),
    "ulysses": Exchange(_ATTENTION, "attention", "ulysses"),
    "gather": Exchange(_ATTENTION, "attention", "gather"),
    "channels": Exchange(S4Config()),
}
"""By name. ring, ulysses and gather are rivals: all three are exact softmax attention."""

LAYOUTS = {
    ("v5e", 4): "2x2",
    ("v5e", 16): "4x4",
    ("v5e", 64): "8x8",
    ("v5e", 256): "16x16",
    ("v5p", 512): "8x8x8",
}
"""How the compiler's topologies of so many chips are called."""


class Key(NamedTuple):
    """What names a cell.

    Attributes:
      exchange: of ``EXCHANGES``.
      chip, chips: which, and how many; each has one shard of the row.
      tokens: of one shard.
      layers: blocks; several are looped over, and each is recomputed in the backward pass.
    """

    exchange: str
    chip: str
    chips: int
    tokens: int
    layers: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each chip: arguments, results that do not replace them, everything else."""

    arguments: int
    outputs: int
    temporary: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporary


def compile_cell(key: Key) -> dict[str, Any]:
    """Figures of one cell, JSON-able: "collectives", "memory", "parameters" and "seconds".

    Where the program does not fit the chip, "memory" is None and "needs" what the compiler says
    that it needs.

    Raises:
      Exception: the compiler's, or of the model, which cannot be split so.
    """
    start = time.perf_counter()
    mesh = mesh_of(key.chip, key.chips)
    lowered, parameters = lower(key, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT])i?B? of", str(error))
        if used is None:
            raise
        needs = int(float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2]))))
        return {
            "collectives": [],
            "memory": None,
            "needs": needs,
            "parameters": parameters,
            "seconds": time.perf_counter() - start,
        }
    return {
        "collectives": [dataclasses.asdict(c) for c in collectives(compiled.as_text() or "")],
        "memory": dataclasses.asdict(memory_of(compiled)),
        "needs": None,
        "parameters": parameters,
        "seconds": time.perf_counter() - start,
    }


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler has planned for each chip."""
    plan: Any = compiled.memory_analysis()
    return Memory(
        plan.argument_size_in_bytes,
        plan.output_size_in_bytes - plan.alias_size_in_bytes,
        plan.temp_size_in_bytes,
    )


def mesh_of(chip: str, chips: int, data: int = 1) -> Mesh:
    """A mesh of absent chips.

    Raises:
      ValueError: the compiler has no topology of so many, or they do not divide.
      ImportError: the compiler is not installed.
    """
    if (chip, chips) not in LAYOUTS:
        known = ", ".join(f"{n} x {name}" for name, n in LAYOUTS)
        raise ValueError(f"chips={chips} of {chip}: choose among {known}")
    devices = aot.topology(chip, LAYOUTS[chip, chips]).devices[:chips]
    return make_mesh(data, seq=chips // data, devices=devices)


def lower(key: Key, mesh: Mesh) -> tuple[jax.stages.Lowered, int]:
    """The program of a cell, forward and backward, and its number of parameters.

    One row of bfloat16 activations ``(1, tokens x chips, WIDTH)`` and its cotangent go through the
    blocks and back: gradients of the activations and of all parameters, which are float32 and whole
    on each chip.
    """
    exchange = EXCHANGES[key.exchange]
    config = BackboneConfig(
        layout=(exchange.mixer.mixer,) * key.layers,
        mixers=(exchange.mixer,),
        width=WIDTH,
        norm="rms",
        remat="none" if key.layers == 1 else "full",
        scan_layers=key.layers > 1,
    )
    model = Backbone(config)
    split = NamedSharding(mesh, PartitionSpec(None, "seq"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1, key.tokens * key.chips, WIDTH), jnp.bfloat16, sharding=split)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, WIDTH), jnp.bfloat16))
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=whole), shapes["params"]
    )

    def run(params: Any, x: Any, cotangent: Any) -> Any:
        def forward(params: Any, x: Any) -> Any:
            return model.apply({"params": params}, x)[0]

        y, pullback = jax.vjp(forward, params, x)
        return y, pullback(cotangent.astype(y.dtype))

    chosen = {exchange.op: exchange.strategy} if exchange.op and exchange.strategy else {}
    program = jax.jit(on_mesh(run, mesh, chosen), out_shardings=(split, (whole, split)))
    count = sum(p.size for p in jax.tree.leaves(params))
    return program.lower(params, x, x), count
