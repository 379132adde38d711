"""Backpropagation chunk by chunk: the gradient of whole rows, or an unbiased one."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.tools import testing
from seqmodels.mixers import AttentionConfig, GLAConfig
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig, param_labels
from seqmodels.parallel import make_mesh, on_mesh, put_batch, replicated
from seqmodels.training.chunks import chunked
from seqmodels.training.language import language
from seqmodels.training.task import Sums
from tests import tolerances
from tests.seqmodels.mixers.cases import CASES, GROWING
from tests.seqmodels.parallel.test_sharded_models import LENGTH, VOCABULARY, batch
from tests.tiers import one_of_many

STREAMS = [
    name for name, case in CASES.items() if case.causal and case.stateful and name not in GROWING
]


def model_of(config, layers=1, **options):
    backbone = BackboneConfig(
        layout=(config.mixer,) * layers, mixers=(config,), width=8, norm="rms", **options
    )
    return LanguageModel(LanguageModelConfig(vocabulary_size=VOCABULARY, backbone=backbone))


def loss_of(model, **options):
    task = language(model, functools.partial(param_labels, model.config), tile=7, **options)

    def mean(params, rows):
        sums, _, _ = task.loss({"params": params}, rows, jax.random.key(3), None)
        return sums.loss / sums.weight

    return jax.value_and_grad(mean)


def parameters(model):
    return jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "chunk"),
    one_of_many(itertools.product(STREAMS, (5, 8)), [("lru", 5)]),
)
def test_chunks_give_the_gradient_of_whole_rows(name, chunk):
    """Documents end anywhere, chunks do not divide rows, some are padding, and there is dropout."""
    model = model_of(CASES[name], layers=1 if name == "lru" else 2, mlp=12, dropout=0.3)
    packed = CASES[name].supports_packing
    if not packed:
        chunk = 8  # without segments nothing tells padding from tokens; and with a state
    params = parameters(model)
    whole, pieces = (loss_of(model, packed=packed, chunk=c) for c in (None, chunk))
    expected, actual = (jax.jit(run)(params, batch()) for run in (whole, pieces))
    testing.assert_close(actual, expected, tolerances.FLOAT32_SPLIT_GRADIENTS)


@pytest.mark.full
@pytest.mark.parametrize("name", ["gla", "mamba", "rg_lru"])
def test_chunks_are_split_over_a_mesh_as_rows_are(name):
    model = model_of(CASES[name], layers=2, mlp=12)
    params = parameters(model)
    whole, pieces = (loss_of(model, chunk=chunk) for chunk in (None, 8))
    mesh = make_mesh(2, 2, 2)
    actual = jax.jit(on_mesh(pieces, mesh))(
        jax.device_put(params, replicated(mesh)), put_batch(batch(), mesh)
    )
    expected = jax.jit(whole)(params, batch())
    testing.assert_close(actual, expected, tolerances.FLOAT32_SPLIT_GRADIENTS)


def recurrence(params, drawn, share, chunk=2):
    """The loss of a recurrence that is not linear, over rows of four chunks."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 8)).astype(np.float32))
    state = {"h": rng.standard_normal((3, 2)).astype(np.float32), "n": np.zeros(3, np.int32)}

    def run(state, rows):
        h, loss = state["h"], 0.0
        for token in range(chunk):
            x = rows["x"][:, token, None]
            h = jnp.tanh(h @ params["w"] + x * params["v"])
            loss = loss + jnp.sum(h**2)
        zero = jnp.zeros(())
        return Sums(loss, zero, zero), {"h": h, "n": state["n"] + 1}

    sums, last = chunked(run, state, {"x": x}, chunk=chunk, drawn=drawn, share=share)
    return sums.loss + jnp.sum(jnp.sin(last["h"]))


def test_the_gradient_through_some_chunks_is_unbiased():
    """Its expectation, over all the subsets that may be drawn, is the whole gradient."""
    rng = np.random.default_rng(1)
    params = {"w": rng.standard_normal((2, 2)), "v": rng.standard_normal((1, 2))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    subsets = np.array(list(itertools.product([False, True], repeat=4)))
    share = 0.4
    chance = share ** subsets.sum(1) * (1 - share) ** (~subsets).sum(1)

    def expectation(share):
        gradient = jax.grad(lambda params, drawn: recurrence(params, drawn, share))
        each = jax.jit(jax.vmap(gradient, (None, 0)))(params, subsets)
        return jax.tree.map(lambda g: np.tensordot(chance, np.asarray(g, np.float64), 1), each)

    exact = jax.jit(jax.grad(lambda params: recurrence(params, None, 1.0)))(params)
    plain = jax.jit(jax.grad(lambda params: recurrence(params, None, 1.0, chunk=8)))(params)
    testing.assert_close(exact, plain, tolerances.FLOAT32)
    testing.assert_close(expectation(share), exact, tolerances.FLOAT32_BOTH)
    biased = expectation(share**0.5)
    assert testing.rmse_ratio(biased["w"], exact["w"]) > 0.1


@pytest.mark.full
def test_a_step_draws_its_chunks():
    model = model_of(CASES["lru"])
    draws = language(model, lambda params: params, chunk=8, share=0.5)
    variables = {"params": parameters(model)}

    @jax.jit
    def run(key):
        loss = lambda params: draws.loss({"params": params}, batch(), key, None)[0].loss  # noqa: E731
        return jax.value_and_grad(loss)(variables["params"])

    (one, first), (two, second) = run(jax.random.key(0)), run(jax.random.key(7))
    assert one == two  # without dropout the loss is that of all chunks
    norms = [float(optax.tree.norm(g)) for g in (first, second)]
    assert norms[0] != norms[1]


@pytest.mark.full
def test_memory_of_chunks_hardly_grows_with_the_length():
    model = model_of(GLAConfig(heads=2), layers=2, scan_layers=True)

    def bytes_of(length, **options):
        run, params = loss_of(model, packed=False, **options), parameters(model)
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        weights = jax.ShapeDtypeStruct((1, length), jnp.float32)
        rows = {"inputs": tokens, "targets": tokens, "weights": weights}
        compiled = jax.jit(run).lower(params, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = bytes_of(4096) - bytes_of(2048)
    pieces = bytes_of(4096, chunk=256) - bytes_of(2048, chunk=256)
    assert pieces < plain / 8


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (AttentionConfig(heads=1), {"chunk": 8}, "chunk=8 needs states of a fixed size"),
        (GLAConfig(heads=2), {"share": 0.5}, r"share=0\.5 is of chunks; set chunk"),
    ],
)
def test_what_cannot_be_chunked_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(model_of(config), **options)


def test_batch_norm_and_rests_are_refused():
    model = model_of(GLAConfig(heads=2))
    stack = dataclasses.replace(model.config.backbone, norm="batch")
    with pytest.raises(ValueError, match="chunk=8 cannot have norm='batch'"):
        loss_of(LanguageModel(dataclasses.replace(model.config, backbone=stack)), chunk=8)
    task = language(model, lambda params: params, packed=False, chunk=7)
    state = model.initial_state(4, dtype=jnp.float32)
    with pytest.raises(ValueError, match=f"chunk=7 does not divide rows of {LENGTH} tokens"):
        task.loss({"params": {}}, batch(), None, state)
