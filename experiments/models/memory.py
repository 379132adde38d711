"""The longest row that a training step fits in memory, with and without what saves memory.

Read from compiled programs, which are not run: their arguments and their temporaries. Between two
lengths memory is a line; the length where it reaches the budget is compiled too.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels.results import COMPILED, Result
from experiments.lm.presets import MemoryConfig
from pallas_kernels.tools import testing
from seqmodels.mixers import GLAConfig
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig, param_labels
from seqmodels.parallel import make_mesh, token_sharding
from seqmodels.training.config import TrainConfig
from seqmodels.training.language import language
from seqmodels.training.masked import masked_language
from seqmodels.training.state import abstract_state, optimizer_of
from seqmodels.training.step import make_train_step
from seqmodels.training.task import Task

BUDGET = 4 * 2**30
LENGTHS = (4096, 8192)
STEP = 256
"""Lengths are multiples of it."""
MODEL = LanguageModelConfig(
    vocabulary_size=8192,
    backbone=BackboneConfig(
        layout=("gla",) * 8,
        mixers=(GLAConfig(heads=4),),
        width=256,
        norm="rms",
        mlp=1024,
        mlp_kind="swiglu",
        final_norm=True,
        scan_layers=True,
    ),
)
PLAIN = MemoryConfig(loss_tile=None)
# By name: fields of the backbone, and what the task keeps.
OPTIONS: dict[str, tuple[Mapping[str, Any], MemoryConfig]] = {
    "nothing": ({}, PLAIN),
    "loss_tile": ({}, MemoryConfig()),
    "remat=full": ({"remat": "full"}, PLAIN),
    "mlp_tile": ({"mlp_tile": 1024}, PLAIN),
    "chunk": ({}, MemoryConfig(loss_tile=None, chunk=1024)),
    "loss_tile, remat=full": ({"remat": "full"}, MemoryConfig()),
    "loss_tile, remat=full, mlp_tile": ({"remat": "full", "mlp_tile": 1024}, MemoryConfig()),
    "loss_tile, chunk": ({}, MemoryConfig(chunk=1024)),
}


def results(
    repetitions: int,
    seed: int,
    model: LanguageModelConfig = MODEL,
    names: tuple[str, ...] = tuple(OPTIONS),
    budget: int = BUDGET,
    lengths: tuple[int, int] = LENGTHS,
) -> Iterator[Result]:
    """A row for each option; the arguments of all parts of the bench, of which none matters."""
    del repetitions, seed
    first = 0
    for name in names:
        backbone = dataclasses.replace(model.backbone, **OPTIONS[name][0])
        needs = functools.partial(
            step_bytes, dataclasses.replace(model, backbone=backbone), OPTIONS[name][1]
        )
        short, long = (needs(length) for length in lengths)
        a_token = (long - short) / (lengths[1] - lengths[0])
        longest = fitting(needs, budget, short - a_token * lengths[0], a_token)
        first = first or longest
        yield Result(
            case=name,
            device=jax.devices()[0].device_kind,
            kind=COMPILED,
            shape=f"batch 1, {len(model.backbone.layout)} blocks of {backbone.width}, float32",
            figures={
                "bytes a token": a_token,
                "longest tokens": longest,
                "bytes of the longest": needs(longest),
                "budget bytes": budget,
            },
            ratios={names[0]: longest / first},
        )


def fitting(needs: Any, budget: int, fixed: float, a_token: float) -> int:
    """The longest length by the line, or as much shorter as it takes."""
    length = max(int((budget - fixed) / a_token) // STEP, 1) * STEP
    while length > STEP and needs(length) > budget:
        length = max(int(0.95 * length) // STEP, 1) * STEP
    return length


@functools.cache
def step_bytes(model: LanguageModelConfig, memory: MemoryConfig, length: int, rows: int = 1) -> int:
    """Bytes of a training step: state, batch and what it needs in between.

    The loss is over next tokens, or over hidden ones if the model sees both sides.
    """
    task = task_of(model, memory)
    config, mesh = TrainConfig(batch_size=rows), make_mesh(devices=jax.devices()[:1])
    where = token_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=where)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32, sharding=where)
    step: Any = make_train_step(task, optimizer_of(task, config), mesh)
    lowered = step.lower(
        abstract_state(task, config, mesh),
        {"inputs": tokens, "targets": tokens, "weights": weights},
        jax.ShapeDtypeStruct((), bool),
    )
    # They are not run: machine code need not be fast.
    analysis = lowered.compile(compiler_options=testing.QUICK).memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def task_of(model: LanguageModelConfig, memory: MemoryConfig) -> Task:
    """The model's task on rows of one document."""
    module, labels = LanguageModel(model), functools.partial(param_labels, model)
    if all(config.causal for config in model.backbone.mixers):
        return language(module, labels, packed=False, tile=memory.loss_tile, chunk=memory.chunk)
    mask = model.vocabulary_size - 1
    return masked_language(module, labels, mask_token=mask, packed=False, tile=memory.loss_tile)
