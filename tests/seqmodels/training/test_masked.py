"""Masked language models and prefix language models: what is hidden, what counts, what leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.tools import testing
from seqmodels.mixers import GLAConfig, HydraConfig, JRTConfig, MonarchConfig, Segments
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig, param_labels
from seqmodels.training.masked import (
    MASKED,
    PREFIX_WEIGHT,
    RANDOM,
    hide,
    masked_language,
    prefix_language,
)
from tests import tolerances

LETTERS, WIDTH, LENGTH = 13, 8, 16
MASK = LETTERS
JRT = JRTConfig(heads=2, feature_size=3, prefix=5, init_std=0.5)


def model_of(*mixers):
    backbone = BackboneConfig(
        layout=tuple(config.mixer for config in mixers), mixers=mixers, width=WIDTH, norm="rms"
    )
    return LanguageModel(LanguageModelConfig(backbone, LETTERS + 1, embedding_std=1.0))


def batch_of(rows=3, packed=False):
    tokens = np.random.default_rng(0).integers(0, LETTERS, (rows, LENGTH + 1)).astype(np.int32)
    ids = np.ones((rows, LENGTH), np.int32)
    if packed:
        ids[:, 9:] = 2
    ids[-1, -4:] = 0
    weights = (ids > 0).astype(np.float32)
    return {
        "inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ids, "weights": weights,
    }  # fmt: skip


def task_of(kind, model, **options):
    return kind(model, lambda p: param_labels(model.config, p), mask_token=MASK, **options)


def losses_of(model, variables, seen, wanted, segments=None):
    logits, _ = jax.jit(model.apply)(variables, seen, segments=segments)
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted)


def test_the_shares_of_what_is_hidden():
    tokens = jnp.zeros((200, 200), jnp.int32)
    real = jnp.ones(tokens.shape, bool).at[:, 150:].set(False)
    seen, chosen = hide(tokens, real, jax.random.key(0), 0.3, MASK)
    assert not np.any(chosen[:, 150:])
    np.testing.assert_allclose(np.mean(chosen[:, :150]), 0.3, atol=0.01)
    assert not np.any(np.asarray(seen)[~np.asarray(chosen)])
    shown = np.asarray(seen)[np.asarray(chosen)]
    np.testing.assert_allclose(np.mean(shown == MASK), MASKED, atol=0.01)
    others = np.bincount(shown, minlength=LETTERS + 1)[1:LETTERS] / len(shown)
    np.testing.assert_allclose(others, RANDOM / LETTERS, atol=0.004)


def test_the_loss_of_a_masked_model_is_over_what_is_hidden():
    model = model_of(
        HydraConfig(state_size=2, head_size=4), MonarchConfig(length=8, filter_width=4)
    )
    task = task_of(masked_language, model, share=0.4, packed=False)
    variables, batch = task.init(jax.random.key(0)), batch_of()
    loss = jax.jit(task.loss)
    sums, _, _ = loss(variables, batch, None, None)
    again, _, _ = loss(variables, batch, None, None)
    testing.assert_close(sums, again, 0.0)  # the same places each time
    real = jnp.asarray(batch["weights"]) > 0
    key = jax.random.split(jax.random.key(0))[1]
    seen, hidden = hide(jnp.asarray(batch["inputs"]), real, key, 0.4, MASK)
    losses = losses_of(model, variables, seen, batch["inputs"])
    testing.assert_close(sums.loss, jnp.sum(losses[hidden]), tolerances.FLOAT32_TERMS)
    assert sums.weight == np.sum(hidden)
    other, _, _ = loss(variables, batch, jax.random.key(3), None)
    assert other.weight != sums.weight


def test_the_loss_behind_a_prefix_and_in_it():
    model = model_of(JRT, GLAConfig(heads=2, init_std=0.5))
    task = task_of(prefix_language, model, share=0.5)
    variables, batch = task.init(jax.random.key(0)), batch_of(packed=True)
    segments = Segments.from_ids(batch["segment_ids"])
    early = np.asarray(segments.positions) < JRT.prefix
    counted = batch["weights"] > 0

    evaluated, _, _ = jax.jit(task.loss)(variables, batch, None, None)
    losses = losses_of(model, variables, batch["inputs"], batch["targets"], segments)
    behind = counted & ~early
    testing.assert_close(evaluated.loss, jnp.sum(losses[behind]), tolerances.FLOAT32_TERMS)
    assert evaluated.weight == np.sum(behind)

    key = jax.random.key(5)
    sums, _, _ = jax.jit(task.loss)(variables, batch, key, None)
    drawn = jax.random.bernoulli(jax.random.split(key)[1], 0.5, early.shape)
    hidden = early & counted & np.asarray(drawn)
    seen = jnp.where(hidden, MASK, batch["inputs"])
    following = losses_of(model, variables, seen, batch["targets"], segments)[behind]
    masked = losses_of(model, variables, seen, batch["inputs"], segments)[hidden]
    expected = jnp.sum(following) + PREFIX_WEIGHT * jnp.mean(masked) * np.sum(behind)
    testing.assert_close(sums.loss, expected, tolerances.FLOAT32_TERMS)


def test_no_target_leaks_into_what_is_seen_before_it():
    """The loss of a place behind the prefix does not change with later tokens."""
    model = model_of(JRT)
    variables = task_of(prefix_language, model).init(jax.random.key(0))
    batch = batch_of()
    other = batch["inputs"].copy()
    other[:, 10:] = (other[:, 10:] + 1) % LETTERS
    run = jax.jit(model.apply)
    one, two = (run(variables, x)[0] for x in (batch["inputs"], other))
    np.testing.assert_array_equal(one[:, :10], two[:, :10])
    assert np.any(one[:, 10:] != two[:, 10:])


@pytest.mark.parametrize(
    ("kind", "mixers", "options", "message"),
    [
        (masked_language, (HydraConfig(head_size=4),), {}, "packed=True needs mixers that keep"),
        (prefix_language, (GLAConfig(heads=2),), {}, "a prefix needs JRT layers"),
        (prefix_language, (JRT, HydraConfig(head_size=4)), {}, "mixer='hydra' is bidirectional"),
        (
            masked_language,
            (GLAConfig(heads=2),),
            {"mask_token": LETTERS + 1},
            "mask_token=14 must be above 0 and below vocabulary_size=14",
        ),
    ],
)
def test_what_does_not_fit_is_refused(kind, mixers, options, message):
    model = model_of(*mixers)
    with pytest.raises(ValueError, match=message):
        kind(model, lambda p: p, **{"mask_token": MASK, **options})
