"""Published hybrids at a hundred million random parameters: reading a prompt, and going on.

Each family's layers in the proportions of its models, small enough for a CPU.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels.results import TIMED, Result, Target
from experiments.kernels.timing import check_equal, milliseconds
from experiments.models.decode import GREEDY, generating, opened
from seqmodels import generation
from seqmodels.layers.experts import ExpertsConfig
from seqmodels.mixers import (
    AttentionConfig,
    GatedConvConfig,
    GatedDeltaNetConfig,
    Mamba2Config,
    MambaConfig,
    ParallelConfig,
)
from seqmodels.models import LanguageModel
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import hybrid_language_model, single_branch_language_model

PROMPT, NEW = 2048, 64
_WIDTH, _VOCABULARY = 640, 32_000
_DELTA = GatedDeltaNetConfig(heads=10, key_heads=5, head_size=64, expand_v=1.0, norm_epsilon=1e-6)
_GATED = AttentionConfig(
    heads=10, kv_heads=2, rotary_fraction=0.25, qk_norm=True, zero_centered_norm=True,
    output_gate=True,
)  # fmt: skip
_MAMBA2 = Mamba2Config(state_size=64, head_size=64)
_CLIPPED = Mamba2Config(state_size=64, head_size=64, time_step_limit=(1e-3, math.inf))
_LFM2 = AttentionConfig(heads=10, kv_heads=2, rotary_base=1e6, qk_norm=True, norm_epsilon=1e-5)
_GROUPED = AttentionConfig(heads=10, kv_heads=2)
_NO_POSITIONS = AttentionConfig(heads=10, kv_heads=2, rotary_base=None)
_QWEN: dict[str, Any] = {"norm": "zero_centered_rms", "norm_epsilon": 1e-6, "tie_embeddings": True}
_OTHERS: dict[str, Any] = {"norm_epsilon": 1e-5, "tie_embeddings": True}

MODELS: dict[str, LanguageModelConfig] = {
    "qwen3.5": hybrid_language_model(
        (*("gated_deltanet",) * 3, "attention") * 3, (_DELTA, _GATED), _WIDTH, 2304, _VOCABULARY,
        **_QWEN,
    ),
    "qwen3-next": hybrid_language_model(
        (*("gated_deltanet",) * 3, "attention") * 2, (_DELTA, _GATED), _WIDTH, None, _VOCABULARY,
        **_QWEN, experts=ExpertsConfig(16, 4, 256, shared=256, shared_gate=True),
    ),
    "lfm2": hybrid_language_model(
        (*("gated_conv",) * 3, "attention") * 4,
        (GatedConvConfig(), _LFM2),
        _WIDTH, 1920, _VOCABULARY, **_OTHERS,
    ),
    "bamba": hybrid_language_model(
        (*("mamba2",) * 5, "attention") * 2,
        (_MAMBA2, AttentionConfig(heads=10, kv_heads=2, rotary_fraction=0.5)),
        _WIDTH, 2048, _VOCABULARY, **_OTHERS,
    ),
    "granite-4-h": hybrid_language_model(
        (*("mamba2",) * 5, "attention") * 2, (_MAMBA2, _NO_POSITIONS), _WIDTH, 2048, _VOCABULARY,
        **_OTHERS, residual_scale=0.22, embedding_scale=12.0, logit_scale=0.125,
    ),
    "jamba": hybrid_language_model(
        (*("mamba",) * 3, "attention") * 2,
        (MambaConfig(mixer_rms_eps=1e-5, mixer_rms_scales=True), _NO_POSITIONS),
        _WIDTH, 1024, _VOCABULARY, **_OTHERS, experts=ExpertsConfig(8, 2, 1024, normalised=False),
        dense_blocks=(0, 2, 4, 6),
    ),
    "nemotron-h": single_branch_language_model(
        (*("mamba2", "mlp") * 5, "attention", "mlp") * 2, (_CLIPPED, _NO_POSITIONS), _WIDTH,
        _VOCABULARY, norm_epsilon=1e-5, mlp=2560,
    ),
    "falcon-h1": hybrid_language_model(
        ("parallel",) * 9,
        (ParallelConfig((Mamba2Config(state_size=64, num_heads=12, norm=None), _GROUPED)),),
        _WIDTH, 2304, _VOCABULARY, **_OTHERS,
    ),
}  # fmt: skip


def results(
    repetitions: int,
    seed: int,
    models: Mapping[str, LanguageModelConfig] = MODELS,
    prompt: int = PROMPT,
    new: int = NEW,
) -> Iterator[Result]:
    """Times each model on a prompt, and on the tokens behind a short one."""
    for name, config in models.items():
        yield from _rows(name, config, repetitions, seed, prompt, new)


def _rows(
    name: str, config: LanguageModelConfig, repetitions: int, seed: int, prompt: int, new: int
) -> Iterator[Result]:
    import torch

    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    variables = {"params": params}
    theirs = opened(model, params)
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, config.vocabulary_size, (1, prompt)).astype(np.int32)
    short = ids[:, :16]

    def start(length: int) -> generation.Stream:
        return generation.start(model, 1, max_length=length, dtype=jnp.float32)

    def ours(tokens: np.ndarray) -> Any:
        return generation.feed(model, variables, start(prompt + new), tokens).logits

    def reading(tokens: np.ndarray) -> Any:
        with torch.no_grad():
            mask = torch.ones(tokens.shape)
            found = theirs(torch.tensor(tokens), attention_mask=mask, logits_to_keep=1)
            return found.logits[:, -1].numpy()

    def going_on(tokens: np.ndarray) -> Any:
        return generation.generate(
            model, variables, tokens.tolist(), max_new_tokens=new, sampling=GREEDY
        )

    check_equal(reading(ids), jax.device_get(ours(ids)), name)
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    row = Result(name, jax.devices()[0].device_kind, TIMED, f"{size:.0f}M, batch 1, float32")
    figures = milliseconds({"seqmodels": ours, "transformers": reading}, (ids,), repetitions)
    yield _row(row, f"a prompt of {prompt:,}", figures, prompt, 2.0)
    programs: dict[str, Callable[..., Any]] = {"seqmodels": going_on}
    programs["transformers"] = generating(theirs, new)
    figures = milliseconds(programs, (short,), repetitions)
    yield _row(row, f"{new} tokens one by one", figures, new, 1.5, **_memory(model, params))


def _row(
    row: Result, what: str, figures: Mapping[str, float], tokens: int, least: float, **more: Any
) -> Result:
    rates = {f"{side} tokens/s": 1e3 * tokens / ms for side, ms in figures.items()}
    return Result(
        case=f"{row.case}: {what}",
        device=row.device,
        kind=row.kind,
        shape=row.shape,
        figures={f"{side} ms": ms for side, ms in figures.items()} | rates | more,
        ratios={"transformers": figures["transformers"] / figures["seqmodels"]},
        targets={"transformers": Target("at least", least)},
    )


def _memory(model: LanguageModel, params: Any) -> dict[str, int]:
    """Bytes of a step that decodes one token: of the state, and of all else beside parameters."""
    state = jax.eval_shape(lambda: model.initial_state(1, max_length=PROMPT, dtype=jnp.float32))

    def step(params: Any, tokens: Any, state: Any) -> Any:
        return model.apply({"params": params}, tokens, state=state)

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=2).lower(params, tokens, state).compile()
    analysis = compiled.memory_analysis()
    bytes_of_state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return {
        "state bytes": bytes_of_state,
        "temporary bytes": getattr(analysis, "temp_size_in_bytes", 0),
    }
