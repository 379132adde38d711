"""Every mixer at one size: time of a layer, forward and backward, and memory of a model's step.

Layers are those of `seqmodels lm train --preset small`, of 768 channels, over rows of 2,048 tokens;
a model is twelve of them, each with its MLP, and 257 tokens. Memory is read from the compiled
program, which is not run. Mixers that see both sides are in that mode only if they have no other.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.errors import UsageError
from experiments.kernels.results import TIMED, Result
from experiments.kernels.timing import milliseconds
from experiments.lm import presets
from experiments.lm.presets import MemoryConfig, ModelSize
from experiments.models.memory import step_bytes
from seqmodels.mixers import REGISTRY, MixerConfig, build
from seqmodels.models import BackboneConfig, LanguageModelConfig

SIZE = presets.SIZES["small"]
SHAPE = (4, 2048)


def results(
    repetitions: int,
    seed: int,
    names: tuple[str, ...] = tuple(REGISTRY),
    size: ModelSize = SIZE,
    shape: tuple[int, int] = SHAPE,
) -> Iterator[Result]:
    """A row for each mixer; times as a multiple of attention's, which is timed with each."""
    attention = programs(presets.mixer_config("attention", size), size, shape, seed)
    for name in names:
        config = config_of(name, size)
        own = programs(config, size, shape, seed)
        both = {f"{name} {what}": run for what, run in own.items()}
        both |= {f"attention {what}": run for what, run in attention.items()}
        times = milliseconds(both, (), repetitions)
        layer = build(config, size.width, parent=None)
        ways = ("forward", "forward+backward")
        yield Result(
            case=name,
            device=jax.devices()[0].device_kind,
            kind=TIMED,
            shape=f"batch {shape[0]}, length {shape[1]}, width {size.width}, float32",
            figures={f"{what} ms": times[f"{name} {what}"] for what in ways}
            | {
                "parameters of a layer": parameters_of(config, size),
                "state bytes": layer.state_bytes(shape[1]) if layer.stateful else 0,
                "bytes of a step": step_bytes(model_of(config, size), MemoryConfig(), *shape[::-1]),
            },
            ratios={
                f"attention, {what}": times[f"attention {what}"] / times[f"{name} {what}"]
                for what in ways
            },
        )


def config_of(name: str, size: ModelSize) -> MixerConfig:
    """The causal mode of a mixer, or the one that it has."""
    try:
        return presets.mixer_config(name, size)
    except UsageError:
        return presets.mixer_config(name, size, "mlm")


def programs(
    config: MixerConfig, size: ModelSize, shape: tuple[int, int], seed: int
) -> dict[str, Any]:
    """The layer's outputs, and its outputs and gradients, on inputs of its own."""
    layer = build(config, size.width, parent=None)
    one, two, three = jax.random.split(jax.random.key(seed), 3)
    x, dy = (jax.random.normal(key, (*shape, size.width)) for key in (one, two))
    params = jax.jit(layer.init)(three, x[:, :2])["params"]

    def forward(params: Any, x: Any) -> Any:
        return layer.apply({"params": params}, x)[0]

    def both(params: Any, x: Any, dy: Any) -> Any:
        y, pull = jax.vjp(forward, params, x)
        return y, pull(dy)

    return {
        "forward": functools.partial(jax.jit(forward), params, x),
        "forward+backward": functools.partial(jax.jit(both), params, x, dy),
    }


def parameters_of(config: MixerConfig, size: ModelSize) -> int:
    """Numbers in a layer."""
    x = jax.ShapeDtypeStruct((1, 2, size.width), jnp.float32)
    layer = build(config, size.width, parent=None)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def model_of(config: MixerConfig, size: ModelSize) -> LanguageModelConfig:
    """So many layers and their MLPs."""
    backbone = BackboneConfig(
        layout=(config.mixer,) * size.layers,
        mixers=(config,),
        width=size.width,
        norm="rms",
        mlp=size.mlp,
        final_norm=True,
        scan_layers=True,
        remat="full",
    )
    return LanguageModelConfig(backbone, presets.VOCABULARY + 1)
