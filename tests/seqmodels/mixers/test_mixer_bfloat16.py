"""Every mixer, and every family of published models, in bfloat16 on a CPU, against float32.

The mixers' contract has longer rows, with documents and a state; here are the shortest: XLA's CPU
backend refuses products of bfloat16 arrays with float32 sums in layouts that depend on the batch
and the length.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.generation import Sampling, generate
from seqmodels.mixers import (
    REGISTRY,
    Mamba2Config,
    MambaConfig,
    RGLRUConfig,
    SlidingWindowConfig,
    build,
)
from seqmodels.models import LanguageModel
from seqmodels.models.published import griffin_language_model, mamba_language_model
from tests import tolerances
from tests.seqmodels.mixers.cases import CASES
from tests.tiers import one_of_many

WIDTH = 12  # the fewest channels that all heads divide
SHAPES = [(1, 1), (1, 5), (2, 1), (3, 7)]
ONE_OF_EACH = {config.mixer: case for case, config in reversed(CASES.items())}
# Mixers that sum products of bfloat16 arrays in float32; they run by the portable implementation.
PRODUCTS = {"attention", "sliding_window", "rat", "scout", "rg_lru"}


def relative(found, expected):
    found, expected = np.asarray(found, np.float32), np.asarray(expected)
    return np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))


def loss_of(run):
    """A scalar of ``run(variables, x)``, differentiated by the variables, compiled."""

    def loss(variables, x):
        wide = run(variables, x).astype(jnp.float32)
        return jnp.mean(wide * jnp.cos(jnp.arange(wide.shape[-1], dtype=jnp.float32))[None, None])

    return jax.jit(jax.grad(loss))


@pytest.mark.full
@pytest.mark.parametrize(
    "case", one_of_many([ONE_OF_EACH[m] for m in sorted(PRODUCTS)], [ONE_OF_EACH["rg_lru"]])
)
def test_mixers(case):
    config = CASES[case]
    mixer = build(config, WIDTH)
    x = jax.random.normal(jax.random.key(1), (3, 7, WIDTH))
    variables = jax.jit(mixer.init)(jax.random.key(0), x)

    def run(variables, x):
        state = None
        if mixer.stateful:
            state = mixer.initial_state(x.shape[0], max_length=8, dtype=x.dtype)
        return mixer.apply(variables, x, state=state)[0]

    jitted, gradients = jax.jit(run), loss_of(run)
    whole = jitted(variables, x)
    for batch, length in SHAPES:
        part = x[:batch, :length]
        expected = whole[:batch, :length] if mixer.causal else jitted(variables, part)
        narrow = part.astype(jnp.bfloat16)
        y = jitted(variables, narrow)
        assert y.dtype == jnp.bfloat16
        assert relative(y, expected) <= tolerances.BFLOAT16_MIXER
        if config.mixer == "rg_lru":
            assert relative(run(variables, narrow), expected) <= tolerances.BFLOAT16_MIXER
        tree = gradients(variables, narrow)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    found, wanted = (
        np.concatenate([g.ravel() for g in jax.tree.leaves(t)])
        for t in (tree, gradients(variables, x))
    )
    assert relative(found, wanted) <= tolerances.BFLOAT16_MIXER


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_mixers_in_every_way(name, shape):
    """Eager, compiled, differentiated and token by token, as users get it: the default config.

    Not the small configs of other tests: over heads of two channels, normalisation amplifies the
    rounding of its inputs.
    """
    kind = REGISTRY[name][0]
    mixer = build(CASES[ONE_OF_EACH[name]] if name == "bidirectional" else kind(), 64)
    x = jax.random.normal(jax.random.key(1), (*shape, 64))
    narrow = x.astype(jnp.bfloat16)
    variables = mixer.init(jax.random.key(0), x)

    def run(variables, x):
        return mixer.apply(variables, x)[0]

    expected = run(variables, x)
    for way in (run, jax.jit(run)):
        y = way(variables, narrow)
        assert y.dtype == jnp.bfloat16
        assert relative(y, expected) <= tolerances.BFLOAT16_MIXER
    gradients = loss_of(run)
    found, wanted = (
        np.concatenate([g.ravel() for g in jax.tree.leaves(gradients(variables, z))])
        for z in (narrow, x)
    )
    assert relative(found, wanted) <= tolerances.BFLOAT16_MIXER
    if mixer.stateful and mixer.causal:
        state, rows = mixer.initial_state(shape[0], max_length=8, dtype=jnp.bfloat16), []
        for t in range(shape[1]):
            y, state = mixer.apply(variables, narrow[:, t : t + 1], state=state)
            rows.append(y)
        assert relative(jnp.concatenate(rows, 1), expected) <= tolerances.BFLOAT16_MIXER


ENDS = {
    "mamba": mamba_language_model(64, 1, MambaConfig(state_size=4), 11),
    "falcon_mamba": mamba_language_model(64, 1, MambaConfig(state_size=4, mixer_rms_eps=1e-6), 11),
    "mamba2": mamba_language_model(64, 1, Mamba2Config(state_size=4, head_size=16), 11),
    "griffin": griffin_language_model(
        ("rg_lru", "sliding_window"),
        (RGLRUConfig(heads=2), SlidingWindowConfig(heads=2, kv_heads=1, window=3)),
        64, 64, 11,
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("family", one_of_many(ENDS, ["mamba2"]))
def test_published_families(family):
    wide = LanguageModel(ENDS[family])
    narrow = LanguageModel(dataclasses.replace(ENDS[family], dtype="bfloat16"))
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, 11)
    variables = jax.jit(wide.init)(jax.random.key(0), tokens)
    gradients = loss_of(lambda variables, ids: narrow.apply(variables, ids)[0])
    expected = jax.jit(wide.apply)(variables, tokens)[0]
    for batch, length in SHAPES:
        logits = jax.jit(narrow.apply)(variables, tokens[:batch, :length])[0]
        assert relative(logits, expected[:batch, :length]) <= tolerances.BFLOAT16_MIXER
    tree = gradients(variables, tokens)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    continued = functools.partial(
        generate, narrow, variables, max_new_tokens=2, sampling=Sampling(temperature=0)
    )
    new = continued([[1, 2, 3], [4]])
    assert [len(row) for row in new] == [2, 2]


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", ENDS)
def test_published_families_in_every_way(family, shape):
    """Eager, compiled, differentiated and token by token."""
    wide = LanguageModel(ENDS[family])
    narrow = LanguageModel(dataclasses.replace(ENDS[family], dtype="bfloat16"))
    tokens = jax.random.randint(jax.random.key(1), shape, 0, 11)
    variables = jax.jit(wide.init)(jax.random.key(0), tokens)
    expected = wide.apply(variables, tokens)[0]
    for run in (narrow.apply, jax.jit(narrow.apply)):
        assert relative(run(variables, tokens)[0], expected) <= tolerances.BFLOAT16_MIXER
    found, wanted = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])
        for gradients in (
            loss_of(lambda variables, ids, model=model: model.apply(variables, ids)[0])(
                variables, tokens
            )
            for model in (narrow, wide)
        )
    )
    assert relative(found, wanted) <= tolerances.BFLOAT16_MIXER
    state, rows = narrow.initial_state(shape[0], max_length=8, dtype=jnp.bfloat16), []
    for t in range(shape[1]):
        logits, state = jax.jit(narrow.apply)(variables, tokens[:, t : t + 1], state=state)
        rows.append(logits)
    assert relative(jnp.concatenate(rows, 1), expected) <= tolerances.BFLOAT16_MIXER
