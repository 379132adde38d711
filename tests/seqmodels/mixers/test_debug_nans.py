"""Healthy programs under `jax.debug_nans` and `jax.debug_infs`, op by op and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.generation import Sampling, generate, sample
from seqmodels.mixers import AttentionConfig, RATConfig, S5Config, Segments, build
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig
from tests.seqmodels.mixers.cases import CASES
from tests.tiers import one_of_many

WIDTH, LENGTH = 12, 5
IDS = np.array([[1, 1, 2, 2, 0], [3, 3, 3, 3, 3]], np.int32)
ALONE = np.array([[1, 1, 1, 1, 0], [3, 3, 3, 3, 3]], np.int32)
ONE_OF_EACH = {config.mixer: case for case, config in reversed(CASES.items())}
# Mixers with masks and caches of their own; the others' are those of the ops.
STEP_BY_STEP = {"attention", "sliding_window", "rat", "scout", "rg_lru"}


@pytest.fixture(autouse=True)
def _stop_at_what_is_not_finite():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


@pytest.mark.full
@pytest.mark.parametrize("case", one_of_many(ONE_OF_EACH.values(), ["attention"]))
def test_mixers(case):
    """Outside of `jax.jit` every step is checked, inside what comes out."""
    mixer = build(CASES[case], WIDTH)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    packed = mixer.supports_packing
    segments = Segments.from_ids(IDS if packed else ALONE, single=not packed)
    state = None
    if mixer.stateful:
        state = mixer.initial_state(2, max_length=2 * LENGTH, dtype=x.dtype)
    variables = jax.jit(mixer.init)(jax.random.key(1), x)
    if mixer.config.mixer in STEP_BY_STEP:
        mixer.apply(variables, x, segments=segments, state=state)

    @jax.jit
    @jax.grad
    def gradients(variables, segments, state):
        y, after = mixer.apply(variables, x, segments=segments, state=state)
        if mixer.stateful:
            y = y + mixer.apply(variables, x[:, :1], state=after)[0]
        return jnp.sum(jnp.sin(y))

    gradients(variables, segments, state)


@pytest.mark.full
@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize(
    ("case", "with_state"),
    [
        (case, with_state)
        for case in ONE_OF_EACH.values()
        for with_state in (False, True)
        if build(CASES[case], WIDTH).stateful or not with_state
    ],
)
def test_every_mixer_op_by_op(case, with_segments, with_state):
    mixer = build(CASES[case], WIDTH)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    packed = mixer.supports_packing
    segments = Segments.from_ids(IDS if packed else ALONE, single=not packed)
    segments = segments if with_segments else None
    state = mixer.initial_state(2, max_length=2 * LENGTH, dtype=x.dtype) if with_state else None
    variables = mixer.init(jax.random.key(1), x)

    def total(variables):
        return jnp.sum(jnp.sin(mixer.apply(variables, x, segments=segments, state=state)[0]))

    jax.grad(total)(variables)


@pytest.mark.full
@pytest.mark.parametrize(
    "config",
    one_of_many(
        [AttentionConfig(heads=2), RATConfig(heads=2, groups=1)], [RATConfig(heads=2, groups=1)]
    ),
)
def test_a_stop_is_where_a_cache_overflows(config):
    mixer, x = build(config, WIDTH), jnp.ones((1, 40, WIDTH))
    variables = mixer.init(jax.random.key(1), x)
    state = mixer.initial_state(1, max_length=3, dtype=x.dtype)
    mixer.apply(variables, x[:, :3], state=state)
    with pytest.raises(FloatingPointError):
        mixer.apply(variables, x, state=state)


@pytest.mark.full
def test_generation():
    mixers = (S5Config(state_size=4), AttentionConfig(heads=2))
    backbone = BackboneConfig(("s5", "attention"), mixers, width=8, mlp=8)
    model = LanguageModel(LanguageModelConfig(backbone, 11))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    sampling = Sampling(top_k=3, top_p=0.5)
    generate(model, variables, [[1, 2, 3], [4]], max_new_tokens=2, sampling=sampling)


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(top_p=0.6)])
def test_draws_leave_out_what_they_should(sampling):
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.05, 0.45]]))
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = {int(sample(logits, key, sampling)[0]) for key in keys}
    assert drawn == {1, 3}
