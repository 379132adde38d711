"""A whole training step of a model of 1.3 billion parameters, compiled for 64 v5e chips."""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.scaling.collectives import collectives
from experiments.scaling.programs import memory_of, mesh_of
from seqmodels.mixers.gla import GLA_1_3B
from seqmodels.mixers.rat import RAT_1_3B
from seqmodels.mixers.sliding_window import SlidingWindowConfig
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig, param_labels
from seqmodels.models.layouts import layout
from seqmodels.parallel import replicated, token_sharding
from seqmodels.training.config import TrainConfig
from seqmodels.training.language import language
from seqmodels.training.state import abstract_state, optimizer_of
from seqmodels.training.step import make_train_step

CHIPS = 64
LAYERS = 24
MODELS = ("gla-1.3b", "rat-1.3b")
"""GLA; and RAT in turn with attention to a window of 1024."""


def model_config(name: str, layers: int) -> LanguageModelConfig:
    """The model with fewer blocks: width 2048, a gated MLP, blocks recomputed and scanned over."""
    if name == "gla-1.3b":
        mixers: tuple[Any, ...] = (GLA_1_3B.config,)
        blocks = ("gla",) * layers
    else:
        window = SlidingWindowConfig(heads=16, kv_heads=2, window=1024)
        mixers, blocks = (RAT_1_3B.config, window), layout("rat_sliding_window", layers)
    backbone = BackboneConfig(
        layout=blocks,
        mixers=mixers,
        width=2048,
        norm="rms",
        final_norm=True,
        mlp=5632,
        mlp_kind="swiglu",
        mlp_bias=False,
        decay_vectors=False,
        remat="full",
        scan_layers=True,
    )
    return LanguageModelConfig(backbone, vocabulary_size=32_000, dtype="bfloat16")


def compile_step(name: str, layers: int, length: int) -> dict[str, Any]:
    """Memory and collectives on each chip of a step on one row, JSON-able.

    Args:
      name: of ``MODELS``.
      layers: blocks.
      length: tokens of the row.
    """
    start = time.perf_counter()
    mesh = mesh_of("v5e", CHIPS)
    config = model_config(name, layers)
    task = language(LanguageModel(config), lambda params: param_labels(config, params), packed=True)
    train = TrainConfig(batch_size=1, clip_norm=1.0, weight_decay=0.1)
    state = abstract_state(task, train, mesh)
    tokens = token_sharding(mesh)

    def rows(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, length), dtype, sharding=tokens)

    batch = {name: rows(jnp.int32) for name in ("inputs", "targets", "segment_ids")}
    batch["weights"] = rows(jnp.float32)
    proceed = jax.ShapeDtypeStruct((), jnp.bool_, sharding=replicated(mesh))
    program: Any = make_train_step(task, optimizer_of(task, train), mesh)
    figures: dict[str, Any] = {
        "model": name,
        "layers": layers,
        "length": length,
        "parameters": int(sum(p.size for p in jax.tree.leaves(state.params))),
        "memory": None,
        "needs": None,
        "collectives": [],
    }
    try:
        compiled = program.lower(state, batch, proceed).compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT])i?B? of", str(error))
        if used is None:
            raise
        figures["needs"] = int(float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2]))))
    else:
        figures["memory"] = dataclasses.asdict(memory_of(compiled))
        figures["needs"] = memory_of(compiled).total
        figures["collectives"] = [
            dataclasses.asdict(c) for c in collectives(compiled.as_text() or "")
        ]
    return figures | {"seconds": time.perf_counter() - start}


def table(steps: dict[str, Any]) -> str:
    """What was compiled and, where that is fewer blocks, what follows for all."""
    lines = [
        "One row split over all 64 chips, blocks scanned over and recomputed in the backward pass, "
        "the loss in tiles, AdamW; parameters float32 where `seqmodels.training` puts them.",
        "",
        "| model | blocks | parameters | tokens | GiB on a chip | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for figures in steps.values():
        groups.setdefault((figures["model"], figures["length"]), []).append(figures)
    for (model, length), group in sorted(groups.items()):
        group.sort(key=lambda figures: figures["layers"])
        points = [(f["layers"], f["parameters"], f["needs"]) for f in group]
        rows = [(*point, "compiled") for point in points]
        if len(points) > 1 and points[-1][0] < LAYERS:  # memory is a line in the blocks
            (n0, p0, m0), (n1, p1, m1) = points[0], points[-1]
            more = (LAYERS - n0) / (n1 - n0)
            rows.append((LAYERS, p0 + more * (p1 - p0), m0 + more * (m1 - m0), "extrapolated"))
        for layers, parameters, needs, how in rows:
            fits = "fits" if needs < 15.75 * 2**30 else "does not fit"
            lines.append(
                f"| {model} | {layers} | {parameters / 1e9:.2f}e9 | {length:,} | "
                f"{needs / 2**30:.1f} | {how}, {fits} |"
            )
    return "\n".join(lines)
