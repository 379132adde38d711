"""Mixers and a language model in a program with `jax_enable_x64`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.generation import Sampling, generate
from seqmodels.mixers import Mamba2Config, Segments, build
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig, param_labels
from seqmodels.parallel.mesh import make_mesh, put_batch
from seqmodels.training.config import TrainConfig
from seqmodels.training.language import language
from seqmodels.training.state import create_state, optimizer_of
from seqmodels.training.step import make_train_step
from tests import tolerances
from tests.seqmodels.mixers.cases import CASES
from tests.tiers import one_of_many

WIDTH = 4
NARROW = {"float32", "complex64", "int32", "bool"}
IDS = np.array([[1, 1, 1, 0], [2, 2, 2, 2]], np.int32)


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def wide_types(jaxpr):
    """Dtypes of 64-bit numbers, other than integers, that a program computes with."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {x.aval.dtype.name for x in equation.outvars if hasattr(x.aval, "dtype")}
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                found |= wide_types(inner)
    return found & {"float64", "complex128"}


@pytest.mark.parametrize("case", one_of_many(CASES, ["s5", "gla", "rat"]))
def test_a_mixer_computes_with_the_same_types(case):
    """Parameters, states, outputs and gradients; nothing in between is wider either."""
    mixer = build(CASES[case], WIDTH)

    def gradients(variables, x, ids):
        segments = Segments.from_ids(ids, single=not mixer.supports_packing)

        def total(variables, x):
            state = None
            if mixer.stateful:
                state = mixer.initial_state(2, max_length=8, dtype=jnp.float32)
            y, state = mixer.apply(variables, x, segments=segments, state=state)
            if mixer.stateful:
                y = y.sum() + mixer.apply(variables, x[:, :1], state=state)[0].sum()
            return y.sum(), state

        return jax.value_and_grad(total, (0, 1), has_aux=True)(variables, x)

    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((*IDS.shape, WIDTH), jnp.float32)
        variables = jax.eval_shape(mixer.init, jax.random.key(0), x)
        assert dtypes(variables) == {"float32"}
        program, outputs = jax.make_jaxpr(gradients, return_shape=True)(
            variables, x, jax.ShapeDtypeStruct(IDS.shape, jnp.int32)
        )
    assert dtypes(outputs) <= NARROW
    assert not wide_types(program.jaxpr)


ONE_OF_EACH = {config.mixer: config for config in reversed(CASES.values())}


@pytest.mark.full
@pytest.mark.parametrize("mixer", [m for m, c in ONE_OF_EACH.items() if build(c, 12).causal])
def test_every_language_model_is_trained_and_generates_the_same(mixer):
    check_language_model(ONE_OF_EACH[mixer], 12)


@pytest.mark.full
def test_a_language_model_is_trained_and_generates_the_same():
    check_language_model(Mamba2Config(state_size=3, head_size=4, implementation="reference"), 8)


def check_language_model(mixer, width):
    stack = BackboneConfig(layout=(mixer.mixer,), mixers=(mixer,), width=width, norm="rms")
    model = LanguageModel(LanguageModelConfig(stack, vocabulary_size=11, embedding_std=1.0))
    config = TrainConfig(steps=4, batch_size=2, learning_rate=0.05, ema_decay=0.9)
    packed = mixer.supports_packing
    ids = IDS if packed else (IDS > 0).astype(np.int32)
    batch = {
        "inputs": np.arange(8, dtype=np.int32).reshape(2, 4),
        "targets": np.arange(1, 9, dtype=np.int32).reshape(2, 4),
        "segment_ids": ids,
        "weights": (ids > 0).astype(np.float32),
    }

    def run():
        """The state after a step and new tokens of the model as it was."""
        mesh = make_mesh(devices=jax.devices()[:1])
        task = language(model, lambda params: param_labels(model.config, params), packed=packed)
        state = create_state(task, config, mesh)
        prompts, sampling = [[1, 2, 3], [4]], Sampling(top_k=5, top_p=0.9)
        tokens = generate(
            model, state.variables, prompts, max_new_tokens=5, sampling=sampling, seed=3
        )
        step = make_train_step(task, optimizer_of(task, config), mesh, ema_decay=config.ema_decay)
        state, measured = step(state, put_batch(batch, mesh), np.asarray(True))
        assert bool(measured.finite)
        key = jax.random.key_data(state.rng)
        return tokens, jax.device_get((state.replace(rng=key), measured))

    tokens, trained = run()
    with jax.enable_x64(True):
        tokens_64, trained_64 = run()
    assert tokens_64 == tokens
    assert dtypes(trained_64) == dtypes(trained)
    testing.assert_close(trained_64, trained, tolerances.FLOAT32_TRAINED)
