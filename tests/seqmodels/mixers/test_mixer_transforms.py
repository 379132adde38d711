"""What every mixer allows: JAX's transformations, extreme inputs, learning to copy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmodels.mixers import build
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig
from tests import tolerances
from tests.seqmodels.mixers.cases import CASES, GROWING
from tests.tiers import one_of_many

# One configuration of each mixer, the first.
FIRST = list({config.mixer: case for case, config in reversed(CASES.items())}.values())[::-1]
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 9, 4)).astype(np.float32))


def setup(case):
    mixer = build(CASES[case], 4)
    return mixer, jax.jit(mixer.init)(jax.random.key(0), X[0])["params"]


def loss(mixer, params, x):
    y, _ = mixer.apply({"params": params}, x)
    return jnp.sum(jnp.sin(y.astype(jnp.float32)))


@pytest.mark.always("gla-bfloat16", "mamba-float32", "s5-bfloat16")
@pytest.mark.parametrize(
    ("case", "dtype"),
    one_of_many(
        [(case, dtype) for dtype in ("float32", "bfloat16") for case in FIRST],
        [(case, "float32") for case in ("s4", "mamba", "rat", "gated_deltanet")]
        + [(case, "bfloat16") for case in ("s5", "s4d", "gla")],
    ),
)
def test_gradients_of_extreme_inputs_are_finite(case, dtype):
    mixer, params = setup(case)
    gradient = jax.jit(jax.grad(lambda p, x: loss(mixer, p, x.astype(dtype)), argnums=(0, 1)))
    for x in (0.0 * X[0], 1e-20 * X[0], 1e3 * X[0], jnp.full_like(X[0], -1e3)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(params, x))[0]:
            assert np.all(np.isfinite(leaf)), (path, x.max())


@pytest.mark.always("s5")
@pytest.mark.parametrize("case", one_of_many(FIRST, ["s5", "mamba"]))
def test_vmap_remat_and_eval_shape(case):
    mixer, params = setup(case)
    plain = jax.jit(jax.grad(lambda x: loss(mixer, params, x)))
    mapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(lambda x: loss(mixer, params, x)))))(X)
    for one, x in zip(mapped, X, strict=True):
        np.testing.assert_allclose(one, plain(x), **tolerances.EACH_FLOAT32_LAYERS)
    y, state = jax.eval_shape(lambda x: mixer.apply({"params": params}, x), X[0])
    assert (y.shape, y.dtype) == (X.shape[1:], X.dtype)
    if mixer.stateful and case not in GROWING:
        kept = mixer.initial_state(3)
        assert jax.tree.structure(state) == jax.tree.structure(kept)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, kept)


@pytest.mark.always("s5")
@pytest.mark.parametrize("case", one_of_many(FIRST, ["s5", "mamba"]))
def test_learns_to_copy(case):
    """Each token's predecessor, of five equally likely ones, in 200 steps of Adam."""
    backbone = BackboneConfig((CASES[case].mixer,), (CASES[case],), width=8, norm="rms", mlp=16)
    model = LanguageModel(LanguageModelConfig(backbone, vocabulary_size=5, embedding_std=1.0))
    optimizer = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        tokens = jax.random.randint(key, (8, 12), 0, 5)

        def error(params):
            logits, _ = model.apply({"params": params}, tokens)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, 1:], tokens[:, :-1])
            return losses.mean()

        value, gradient = jax.value_and_grad(error)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def train(key):
        params = model.init(key, jnp.zeros((8, 12), jnp.int32))["params"]
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 200))[1]

    losses = train(jax.random.key(0))
    assert losses[-20:].mean() < 0.7 * losses[:5].mean()
