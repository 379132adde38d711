"""Time of one decoded token by how many came before it, for every mixer that streams.

States that do not grow are of one size, and the program is one: the state after so many tokens is
stood in for by one with that position. Caches are as long as the context.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.errors import UsageError
from experiments.kernels.results import TIMED, Result, Target
from experiments.kernels.timing import milliseconds
from experiments.lm import presets
from experiments.models.decode import GREEDY, at
from seqmodels import generation
from seqmodels.mixers import REGISTRY
from seqmodels.models import LanguageModel
from seqmodels.training.language import growing_mixers

CONTEXTS = (16, 1_000, 100_000)
CACHED = (16, 1_000, 10_000)  # a cache of 100,000 tokens would mostly measure its copy


def mixers(size: presets.ModelSize) -> list[str]:
    """Those with a causal mode, in the registry's order."""

    def streams(name: str) -> bool:
        try:
            return presets.mixer_config(name, size).stateful
        except UsageError:  # no causal mode
            return False

    return [name for name in REGISTRY if streams(name)]


def results(
    repetitions: int,
    seed: int,
    tokens: int = 64,
    size: presets.ModelSize = presets.SIZES["cpu"],
    names: tuple[str, ...] = (),
) -> Iterator[Result]:
    """A row for each mixer."""
    for name in names or mixers(size):
        yield row(name, size, repetitions, seed, tokens)


def row(name: str, size: presets.ModelSize, repetitions: int, seed: int, tokens: int) -> Result:
    """Milliseconds a token and bytes of the states, in a language model of one mixer."""
    config = presets.language_model(name, size)
    model = LanguageModel(config)
    grows = bool(growing_mixers(model))
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    variables, states = {"params": params}, {}

    def decoding(context: int) -> Callable[[], Any]:
        room = context + tokens if grows else None
        stream = at(generation.start(model, 1, max_length=room, dtype=jnp.float32), context)
        states[context] = sum(leaf.nbytes for leaf in jax.tree.leaves(stream.state))

        def run() -> Any:
            # A copy: decoding takes over the memory of what it is given.
            start = jax.tree.map(jnp.copy, stream)
            return generation.decode(
                model, variables, start, jax.random.key(0), max_new_tokens=tokens, sampling=GREEDY
            )

        return run

    contexts = CACHED if grows else CONTEXTS
    times = milliseconds({str(c): decoding(c) for c in contexts}, (), repetitions)
    near, far = str(contexts[0]), str(contexts[-1])
    return Result(
        case=f"a token, {name}" + ", with a cache" * grows,
        device=jax.devices()[0].device_kind,
        kind=TIMED,
        shape=f"batch 1, {size.layers} blocks of {size.width}, float32",
        figures={f"at {c} ms": ms / tokens for c, ms in times.items()}
        | {f"state bytes at {c}": states[c] for c in contexts},
        ratios={f"the time at {near}": times[far] / times[near]},
        targets={} if grows else {f"the time at {near}": Target("at most", 1.2)},
    )
