"""Greedy decoding with a model of Mamba-130m's size and random weights, one row."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels.results import TIMED, Result, Target
from experiments.kernels.timing import check_equal, milliseconds
from seqmodels import generation
from seqmodels.interop.huggingface import save
from seqmodels.models import LanguageModel
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import PUBLISHED

PROMPT, FAR = 16, 100_000
GREEDY = generation.Sampling(temperature=0.0)


def opened(model: LanguageModel, params: Any) -> Any:
    """Our model in transformers."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save(model, params, folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def generating(theirs: Any, tokens: int) -> Callable[..., Any]:
    """transformers' greedy `generate`."""
    import torch

    theirs.generation_config.eos_token_id = None

    def run(prompt: np.ndarray) -> Any:
        with torch.no_grad():
            ids = torch.tensor(prompt)
            mask = torch.ones_like(ids)
            return theirs.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )

    return run


def at(stream: generation.Stream, context: int) -> generation.Stream:
    """The stream as it would be, in shapes and positions, after `context` tokens."""
    states = tuple(
        dataclasses.replace(state, position=jnp.full_like(state.position, context))
        for state in stream.state
    )
    return dataclasses.replace(stream, state=states)


def results(
    repetitions: int,
    seed: int,
    tokens: int = 64,
    config: LanguageModelConfig = PUBLISHED["mamba-130m"],
) -> Iterator[Result]:
    """Tokens/s of both, then our time for a token near and far from the start."""
    import torch

    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    variables = {"params": params}
    ids = np.random.default_rng(seed).integers(1, config.vocabulary_size, (1, PROMPT))
    theirs = opened(model, params)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    check_equal(expected, jax.device_get(jax.jit(model.apply)(variables, jnp.asarray(ids))[0]), "")

    def ours(prompt: np.ndarray) -> Any:
        return generation.generate(
            model, variables, prompt.tolist(), max_new_tokens=tokens, sampling=GREEDY
        )

    programs = {"seqmodels": ours, "transformers": generating(theirs, tokens)}
    device = jax.devices()[0].device_kind
    shape = f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.0f}M, batch 1, float32"
    figures = milliseconds(programs, (ids,), repetitions)
    rates = {f"{name} tokens/s": 1e3 * tokens / ms for name, ms in figures.items()}
    yield Result(
        case=f"greedy decoding, {PROMPT} tokens and {tokens} more",
        device=device,
        kind=TIMED,
        shape=shape,
        figures={f"{name} ms": ms for name, ms in figures.items()}
        | rates
        | {"threads": torch.get_num_threads()},
        ratios={"transformers": figures["transformers"] / figures["seqmodels"]},
        targets={"transformers": Target("at least", 1.5)},
    )

    stream = generation.feed(model, variables, generation.start(model, 1, dtype=jnp.float32), ids)
    streams = {PROMPT: stream, FAR: at(stream, FAR)}

    def decoding(context: int) -> Callable[[], Any]:
        def run() -> Any:
            # A copy: decoding takes over the memory of what it is given.
            start = jax.tree.map(jnp.copy, streams[context])
            return generation.decode(
                model, variables, start, jax.random.key(0), max_new_tokens=tokens, sampling=GREEDY
            )

        return run

    times = milliseconds(
        {f"token at {context}": decoding(context) for context in streams}, (), repetitions
    )
    yield Result(
        case="our time for a token: the state is of one size and the program one",
        device=device,
        kind=TIMED,
        shape=shape,
        figures={f"{name} ms": ms / tokens for name, ms in times.items()},
        ratios={f"the time at {PROMPT}": times[f"token at {FAR}"] / times[f"token at {PROMPT}"]},
        targets={f"the time at {PROMPT}": Target("at most", 1.1)},
    )
