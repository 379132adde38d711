"""One Mamba block of the 130M model, forward and backward, here and in transformers.

transformers runs mamba.py's parallel scan: with its own loop over time it is several times slower.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from experiments.kernels.results import TIMED, Result, Target
from experiments.kernels.timing import check_equal, milliseconds
from seqmodels.interop.layout import to_theirs
from seqmodels.interop.mamba import MAMBA
from seqmodels.mixers import build
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import PUBLISHED

PREFIX = "backbone/block_0/mixer/"

# Output, then gradients of input and parameters by transformers' names.
Step = Callable[..., tuple[Any, Any, dict[str, Any]]]


def ours(config: LanguageModelConfig) -> tuple[Any, Step]:
    """The module, and `(params, x, dy) -> (y, dx, dparams)`."""
    module = build(config.backbone.mixers[0], config.backbone.width)

    def step(params: Any, x: Any, dy: Any) -> tuple[Any, Any, Any]:
        y, pull = jax.vjp(lambda p, x: module.apply({"params": p}, x)[0], params, x)
        dparams, dx = pull(dy)
        return y, dx, dparams

    return module, jax.jit(step)


def named(tree: Any) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients, as transformers has them."""
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    prefix = MAMBA.theirs(PREFIX + "D").removesuffix("D")
    return {
        MAMBA.theirs(PREFIX + path).removeprefix(prefix): to_theirs(PREFIX + path, np.array(leaf))
        for path, leaf in flat.items()
    }


def theirs(config: LanguageModelConfig, params: Any) -> Step:
    """transformers' mixer with our `params`."""
    import torch
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer

    fields = MAMBA.write(config)
    module = MambaMixer(transformers.MambaConfig(**fields, use_mambapy=True), layer_idx=0)
    weights = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in named(params).items()}
    module.load_state_dict(weights)

    def step(_: Any, x: Any, dy: Any) -> tuple[Any, Any, Any]:
        x = torch.tensor(np.asarray(x)).requires_grad_()
        module.zero_grad()
        y = module(x)
        y.backward(torch.tensor(np.asarray(dy)))
        return y.detach(), x.grad, {k: p.grad for k, p in module.named_parameters()}

    return step


def results(
    repetitions: int,
    seed: int,
    batch: int = 4,
    length: int = 1024,
    config: LanguageModelConfig = PUBLISHED["mamba-130m"],
) -> Iterator[Result]:
    """One row: two programs whose outputs and gradients are compared before they are timed."""
    width = config.backbone.width
    keys = jax.random.split(jax.random.key(seed), 3)
    x, dy = (jax.random.normal(key, (batch, length, width)) for key in keys[:2])
    module, step = ours(config)
    params = jax.jit(module.init)(keys[2], x[:, :2])["params"]
    name = "transformers, mambapy"
    programs: dict[str, Step] = {"seqmodels": step, name: theirs(config, params)}
    y, dx, dparams = jax.device_get(step(params, x, dy))
    found = jax.tree.map(lambda leaf: leaf.numpy(), programs[name](None, x, dy))
    check_equal((y, dx, named(dparams)), found, name)
    figures = milliseconds(programs, (params, x, dy), repetitions)
    yield Result(
        case="Mamba block, forward+backward",
        device=jax.devices()[0].device_kind,
        kind=TIMED,
        shape=f"batch {batch}, length {length}, width {width}, float32",
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios={name: figures[name] / figures["seqmodels"]},
        targets={name: Target("at least", 3.0)},
    )
