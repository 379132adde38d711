"""One training step of S5 on Long Range Arena with our scan, and with what S5 used, in its place.

The gradient of the loss: everything of a step but the optimizer.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.kernels.baselines import linear_scan as baselines
from experiments.kernels.results import TIMED, Result, Target
from experiments.kernels.timing import milliseconds
from experiments.lra import presets
from seqmodels import ops
from seqmodels.mixers import S5Config
from seqmodels.models import BackboneConfig, Classifier, ClassifierConfig, backbone, param_labels
from seqmodels.segments import mask_padding
from seqmodels.training.task import classification


def _identity_scan(a, b, *, initial_state=None, reverse=False):
    return b, b[:, -1]


def _identity_norm(self: nn.Module, x, *args: Any, **kwargs: Any):
    return x


@contextlib.contextmanager
def replaced(module: Any, name: str, by: Any) -> Iterator[None]:
    """While a program is traced inside, `module.name` is something else."""
    with mock.patch.object(module, name, by):
        yield


@contextlib.contextmanager
def scanned(by: Any) -> Iterator[None]:
    """S5 as products around scans of all of the time, with `by` in place of `linear_scan`."""
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)

    def both_ways(u, decay, input_projection, output_projection, *, segments=None):
        assert segments is None or segments.single
        drive = jax.lax.complex(
            *jnp.split(dot(mask_padding(u, segments), input_projection), 2, axis=-1)
        )
        states = [by(decay, drive, reverse=reverse)[0] for reverse in (False, True)]
        planes = [z for h in states for z in (h.real, h.imag)]
        return dot(jnp.concatenate(planes, axis=-1), output_projection)

    def one_way(a, b, *, segments=None, **options: Any):
        assert segments is None
        return by(a, b, **options)

    with (
        replaced(ops, "bidirectional_mimo_scan", both_ways),
        replaced(ops, "linear_scan", one_way),
    ):
        yield


def gradient(config: ClassifierConfig, length: int) -> Callable[..., Any]:
    """`(variables, batch, key) -> gradients` of the mean loss."""
    task = classification(Classifier(config), lambda p: param_labels(config, p), length=length)

    def fn(variables, batch, key):
        def loss(params):
            sums, *_ = task.loss({**variables, "params": params}, batch, key, None)
            return sums.loss / sums.weight

        return jax.grad(loss)(variables["params"])

    return fn


def programs(
    config: ClassifierConfig, batch_size: int, length: int
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Compiled steps by name, and their arguments.

    "step" is the step as it is, "associative_scan" the one to compare with, "without ..." are
    ablations: the time they save is the share of what they leave out.
    """
    task = classification(Classifier(config), lambda p: param_labels(config, p), length=length)
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = jax.random.randint(keys[0], (batch_size, length), 0, config.vocabulary_size or 2)
    batch = {
        "inputs": tokens,
        "segment_ids": jnp.ones_like(tokens),
        "labels": jnp.arange(batch_size, dtype=jnp.int32) % config.num_classes,
        "weights": jnp.ones((batch_size,), jnp.float32),
    }
    args = (jax.jit(task.init)(keys[1]), batch, keys[2])
    no_gate = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, gate=None))
    variants: dict[str, tuple[ClassifierConfig, Any]] = {
        "step": (config, contextlib.nullcontext()),
        "associative_scan": (
            config, scanned(baselines.associative_scan)
        ),
        "without scan": (config, scanned(_identity_scan)),
        "without norm": (config, replaced(backbone.Norm, "__call__", _identity_norm)),
        "without gate": (no_gate, contextlib.nullcontext()),
    }  # fmt: skip
    compiled = {}
    for name, (variant, context) in variants.items():
        with context:
            compiled[name] = jax.jit(gradient(variant, length)).lower(*args).compile()
    return compiled, args


def result(
    case: str, shape: str, compiled: dict[str, Any], args: tuple[Any, ...], repetitions: int
) -> Result:
    """Times what `programs` gave."""
    figures = milliseconds(compiled, args, repetitions)
    step = figures["step"]
    shares = {
        f"share of {name.removeprefix('without ')}": 1 - figures[name] / step
        for name in figures
        if name.startswith("without ")
    }
    return Result(
        case=case,
        device=jax.devices()[0].device_kind,
        kind=TIMED,
        shape=shape,
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios={"associative_scan": figures["associative_scan"] / step, **shares},
        targets={"associative_scan": Target("at least", 2.0)},
    )


def published() -> ClassifierConfig:
    """Two of the six layers that S5 has for Retrieval and Path-X; initial values differ there."""
    mixer = S5Config(state_size=256, blocks=16, c_init="complex_normal", bidirectional=True)
    stack = BackboneConfig(
        layout=("s5",) * 2, mixers=(mixer,), width=128, norm="batch", gate="half_glu1"
    )
    return ClassifierConfig(backbone=stack, num_classes=2, vocabulary_size=256)


def results(repetitions: int) -> Iterator[Result]:
    """The "cpu" presets at their longest rows (Text with a quarter of its batch), and published
    widths at their published lengths: Retrieval with a quarter of its batch, Path-X an eighth."""
    rows = {}
    for task, share in (("listops", 1), ("text", 4)):
        experiment = presets.experiment(task, "s5", "cpu")
        batch_size = experiment.train.batch_size // share
        rows[task] = experiment.classifier, batch_size, experiment.lengths[-1]
    rows["retrieval"] = published(), 8, 4000
    rows["path-x"] = published(), 4, 16384
    for task, (config, batch_size, length) in rows.items():
        stack = config.backbone
        shape = f"batch {batch_size}, length {length}, {len(stack.layout)} layers of {stack.width}"
        compiled, args = programs(config, batch_size, length)
        yield result(f"S5 step, {task}", shape, compiled, args, repetitions)
