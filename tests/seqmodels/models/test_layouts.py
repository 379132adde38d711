"""Hybrid stacks as language models: one contract for every published order of mixers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers import Segments
from seqmodels.mixers.gated_conv import BASE_CONV
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig
from seqmodels.models.layouts import PATTERNS, layout, masformer, sambay
from tests import tolerances
from tests.seqmodels.mixers.cases import CASES
from tests.tiers import one_of_many

LENGTH = 11
TOKENS = np.random.default_rng(0).integers(0, 13, (2, LENGTH))
# Two documents a row, and padding.
IDS = np.array([[1] * 4 + [2] * 5 + [0] * 2, [3] * 11], np.int32)
MIXERS = {
    name: CASES[name]
    for name in ("rg_lru", "mamba", "sliding_window", "attention", "rat", "based", "jrt")
}
MIXERS |= {"scout": CASES["scout-mamba"], "gated_conv": BASE_CONV}
STACKS = {
    "mamba": 2, "griffin": 5, "samba": 4, "jamba": 5, "rat_sliding_window": 2, "scout": 2,
    "based": 3, "jrt": 3,
}  # fmt: skip
STREAMING = [pattern for pattern in STACKS if pattern != "jrt"]


@functools.cache
def setup(pattern):
    names = layout(pattern, STACKS[pattern])
    backbone = BackboneConfig(
        layout=names,
        mixers=tuple(MIXERS[name] for name in dict.fromkeys(names)),
        width=4,
        norm="rms",
        mlp=6,
        mlp_kind="swiglu",
        final_norm=True,
        scan_layers=True,
    )
    config = LanguageModelConfig(backbone, vocabulary_size=13, embedding_std=1.0)
    model = LanguageModel(config)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)

    @jax.jit
    def run(tokens, segments=None, state=None):
        return model.apply(variables, tokens, segments=segments, state=state)

    return model, variables, run


def start(model):
    return model.initial_state(2, max_length=LENGTH, dtype=jnp.float32)


def test_every_pattern_has_a_stack():
    assert STACKS.keys() == {"mamba", *PATTERNS}
    assert layout("griffin", 5) == ("rg_lru", "rg_lru", "sliding_window", "rg_lru", "rg_lru")
    assert layout("jamba", 32).count("attention") == 4
    assert layout("jamba", 32)[4::8] == ("attention",) * 4
    assert layout("mamba2", 3) == ("mamba2",) * 3
    assert sambay(8) == (
        "mamba", "sliding_window", "mamba", "sliding_window", "mamba", "attention", "gmu",
        "cross_attention",
    )  # fmt: skip
    assert masformer(4, 1) == ("attention", *("sliding_window",) * 3)
    for call, message in (
        (lambda: layout("samba", 0), "layers=0 must be positive"),
        (lambda: sambay(6), "layers=6 must be a positive multiple of 4"),
        (lambda: masformer(4, 5), "full=5 must be at least 0 and at most layers=4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.full
@pytest.mark.parametrize("pattern", one_of_many(STREAMING, always=["griffin"]))
def test_whole_is_chunked_prefill_is_token_by_token(pattern):
    model, _, run = setup(pattern)
    whole, last = run(TOKENS, None, start(model))
    for cuts in ([6, LENGTH], list(range(1, LENGTH + 1))):
        state, outputs = start(model), []
        for begin, end in zip([0, *cuts[:-1]], cuts, strict=True):
            y, state = run(TOKENS[:, begin:end], None, state)
            outputs.append(y)
        np.testing.assert_allclose(
            jnp.concatenate(outputs, 1), whole, **tolerances.EACH_FLOAT32_OUTPUTS
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_OUTPUTS),
            state,
            last,
        )


@pytest.mark.full
@pytest.mark.parametrize("pattern", one_of_many(STACKS, always=["griffin"]))
def test_packed_documents_are_unpacked_ones_and_apart_to_the_bit(pattern):
    _, _, run = setup(pattern)
    segments = Segments.from_ids(IDS)
    packed, _ = run(TOKENS, segments)
    for begin, end in ((0, 4), (4, 9)):
        alone, _ = run(TOKENS[:, begin:end])
        np.testing.assert_allclose(
            packed[0, begin:end], alone[0], **tolerances.EACH_FLOAT32_OUTPUTS
        )
    changed = TOKENS.copy()
    changed[0, :4] = (changed[0, :4] + 1) % 13
    other, _ = run(changed, segments)
    np.testing.assert_array_equal(other[0, 4:9], packed[0, 4:9])
    assert np.abs(other[0, :4] - packed[0, :4]).max() > 1e-4


@pytest.mark.full
@pytest.mark.parametrize("pattern", one_of_many(["griffin", "jamba"], always=["griffin"]))
def test_recomputing_and_unrolling_change_nothing(pattern):
    model, variables, _ = setup(pattern)

    def gradient(backbone, variables):
        config = dataclasses.replace(model.config, backbone=backbone)

        @jax.jit
        @jax.grad
        def loss(params):
            logits, _ = LanguageModel(config).apply({"params": params}, TOKENS)
            return jnp.sum(jnp.sin(logits))

        return loss(variables["params"])

    plain = gradient(model.config.backbone, variables)
    again = gradient(dataclasses.replace(model.config.backbone, remat="full"), variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_REMAT), plain, again
    )
