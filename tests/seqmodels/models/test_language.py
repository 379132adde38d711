"""The language model: logits, tied embeddings, the loss in tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmodels.config import from_dict, to_dict
from seqmodels.mixers import S5Config, Segments
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig, param_labels
from seqmodels.training.cross_entropy import tiled_sums
from tests import tolerances

STACK = BackboneConfig(layout=("s5",) * 2, mixers=(S5Config(state_size=8),), width=6, mlp=12)
CONFIG = LanguageModelConfig(STACK, vocabulary_size=11)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 9))


def variables_of(config):
    return jax.jit(LanguageModel(config).init)(jax.random.key(0), TOKENS)


@pytest.mark.full
def test_tied_and_untied_embeddings():
    tied = variables_of(CONFIG)["params"]
    assert set(tied) == {"embedding", "backbone"}
    untied = LanguageModelConfig(STACK, vocabulary_size=11, tie_embeddings=False)
    assert variables_of(untied)["params"]["head"]["kernel"].shape == (6, 11)
    model = LanguageModel(CONFIG)
    x = jnp.eye(6)
    logits = model.apply({"params": tied}, x, method="logits")
    np.testing.assert_allclose(
        logits, tied["embedding"]["embedding"].T, **tolerances.EACH_FLOAT32_TERMS
    )


def test_logits_are_float32_and_capped():
    config = LanguageModelConfig(
        STACK, vocabulary_size=11, embedding_std=5.0, logit_cap=2.0, dtype="bfloat16"
    )
    logits, _ = jax.jit(LanguageModel(config).apply)(variables_of(config), TOKENS)
    assert logits.dtype == jnp.float32
    assert 1.0 < np.abs(logits).max() <= 2.0


def test_whole_equals_pieces_and_documents_are_kept_apart():
    model, variables = LanguageModel(CONFIG), variables_of(CONFIG)
    run = jax.jit(lambda t, segments=None, state=None: model.apply(
        variables, t, segments=segments, state=state
    ))  # fmt: skip
    whole, _ = run(TOKENS)
    first, state = run(TOKENS[:, :4], None, model.initial_state(2))
    second, _ = run(TOKENS[:, 4:], None, state)
    np.testing.assert_allclose(
        jnp.concatenate([first, second], 1), whole, **tolerances.EACH_FLOAT32_OUTPUT
    )
    segments = Segments.from_ids(np.array([[1] * 4 + [2] * 5] * 2, np.int32))
    packed, _ = run(TOKENS, segments)
    np.testing.assert_allclose(
        packed[:, 4:], run(TOKENS[:, 4:])[0], **tolerances.EACH_FLOAT32_OUTPUT
    )


def _logits(table, x):
    return jnp.dot(x, table.T)


@pytest.mark.parametrize("tile", [1, 4, 100, None])
def test_tiles_give_the_loss_and_gradient_of_the_whole(tile):
    rng = np.random.default_rng(1)
    x, table = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 5, 3), (3, 7)))
    targets = jnp.asarray(rng.integers(0, 7, (2, 5)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 1, (2, 5)) * (targets > 1), jnp.float32)

    def tiled(x, table):
        sums = tiled_sums(_logits, table.T, x, targets, weights, tile=tile)
        return sums.loss, sums

    def whole(x, table):
        logits = jnp.einsum("bld,dv->blv", x, table)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (losses * weights).sum(), ((logits.argmax(-1) == targets) * weights).sum()

    grad = {"argnums": (0, 1), "has_aux": True}
    (loss, sums), gradients = jax.jit(jax.value_and_grad(tiled, **grad))(x, table)
    (expected, correct), others = jax.jit(jax.value_and_grad(whole, **grad))(x, table)
    np.testing.assert_allclose(loss, expected, **tolerances.EACH_FLOAT32_TERMS)
    np.testing.assert_allclose(
        (sums.correct, sums.weight), (correct, weights.sum()), **tolerances.EACH_FLOAT32_TERMS
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_FLIPPED),
        gradients,
        others,
    )


def test_config_round_trip_and_marks():
    assert from_dict(LanguageModelConfig, to_dict(CONFIG)) == CONFIG
    tree = param_labels(CONFIG, variables_of(CONFIG)["params"])
    assert tree["backbone"]["block_0"]["mixer"]["log_step"].group == "ssm"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocabulary_size": 1}, "vocabulary_size=1 must be at least 2"),
        ({"embedding_std": 0.0}, "embedding_std=0.0 must be positive"),
        ({"logit_cap": -1.0}, "logit_cap=-1.0 must be positive and finite or None"),
    ],
)
def test_bad_configs_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**{"backbone": STACK, "vocabulary_size": 11} | changed)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="takes integer ids"):
        LanguageModel(CONFIG).init(jax.random.key(0), jnp.ones((2, 3)))
    ones = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="tile=0 must be positive"):
        tiled_sums(_logits, ones, ones[None], jnp.ones((1, 1), int), ones, tile=0)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("wrong", [-1, 11])
def test_known_ids_outside_of_the_vocabulary_are_refused(kind, wrong):
    tokens = kind(np.array([[1, 2, wrong]], np.int32))
    model = LanguageModel(CONFIG)
    with pytest.raises(ValueError, match=rf"tokens hold the id {wrong}.*vocabulary_size=11"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))
