"""Small language models of every mixer, their length split over devices: equal to one device.

Loss and every gradient, for rows whose documents and padding begin anywhere; two blocks, so that
what one layer gets wrong at a shard's edge the next one reads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.models import (
    Backbone,
    BackboneConfig,
    LanguageModel,
    LanguageModelConfig,
    param_labels,
)
from seqmodels.parallel import make_mesh, on_mesh, put_batch, replicated, token_sharding
from seqmodels.segments import Segments
from seqmodels.training.config import TrainConfig
from seqmodels.training.language import language
from seqmodels.training.state import create_state, optimizer_of
from seqmodels.training.step import make_train_step
from tests import tolerances
from tests.seqmodels.mixers.cases import CASES
from tests.tiers import one_of_many

LENGTH, VOCABULARY, WIDTH = 24, 11, 8
ROWS = [(24,), (12, 12), (7, 10, 7), (3, 5, 1)]


CAUSAL = [name for name in CASES if CASES[name].causal]
BOTH_WAYS = [name for name in CASES if not CASES[name].causal]
STATEFUL = [name for name in CASES if CASES[name].stateful]


@functools.cache
def model_of(name):
    backbone = BackboneConfig(
        layout=(CASES[name].mixer,) * 2, mixers=(CASES[name],), width=WIDTH, norm="rms"
    )
    return LanguageModel(LanguageModelConfig(vocabulary_size=VOCABULARY, backbone=backbone))


def batch():
    rng = np.random.default_rng(0)
    rows = [np.repeat(np.arange(len(sizes)) % 2 + 1, sizes) for sizes in ROWS]
    ids = np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows]).astype(np.int32)
    tokens = rng.integers(0, VOCABULARY, (len(ROWS), LENGTH + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": ids,
        "weights": (ids != 0) * (1 + rng.random(ids.shape).astype(np.float32)),
    }


def loss_and_gradients(name, params, rows):
    task = language(
        model_of(name), lambda params: params, packed=CASES[name].supports_packing, tile=8
    )

    def mean(params):
        sums, _, _ = task.loss({"params": params}, rows, None, None)
        return sums.loss / sums.weight

    return jax.value_and_grad(mean)(params)


def run(name, mesh=None):
    model = model_of(name)
    with jax.default_device(jax.devices()[0]):
        variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))
    function = functools.partial(loss_and_gradients, name)
    if mesh is None:
        return jax.jit(function)(variables["params"], batch())
    params = jax.device_put(variables["params"], replicated(mesh))
    return jax.jit(on_mesh(function, mesh))(params, put_batch(batch(), mesh))


@functools.cache
def on_one_device(name):
    return jax.device_get(run(name))


@pytest.mark.always("gla-3")
@pytest.mark.parametrize(
    ("name", "shards"),
    one_of_many(
        [(name, shards) for name in CAUSAL for shards in (2, 3, 8)],
        [("gla", 3), ("rat", 3)],
    ),
)
def test_a_split_length_changes_nothing(name, shards):
    data = 1 if shards == 8 else 2
    mesh = make_mesh(data, seq=shards, devices=jax.devices()[: data * shards])
    loss, gradients = run(name, mesh)
    expected, expected_gradients = on_one_device(name)
    np.testing.assert_allclose(loss, expected, **tolerances.EACH_FLOAT32_LOSS)
    testing.assert_close(gradients, expected_gradients, tolerances.FLOAT32_SPLIT_GRADIENTS)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "shards"),
    one_of_many(
        [(name, shards) for name in BOTH_WAYS for shards in (3, 8)], [("s5-bidirectional", 3)]
    ),
)
def test_a_split_length_changes_nothing_of_a_bidirectional_mixer(name, shards):
    config = CASES[name]
    backbone = Backbone(BackboneConfig(layout=(config.mixer,), mixers=(config,), width=WIDTH))
    rng = np.random.default_rng(0)
    ids = batch()["segment_ids"]
    if not config.supports_packing:
        ids = (np.asarray(Segments.from_ids(ids).positions) == np.arange(LENGTH)) & (ids != 0)
        ids = np.asarray(ids, np.int32)
    x, cotangent = rng.standard_normal((2, *ids.shape, WIDTH)).astype(np.float32)
    params = jax.jit(backbone.init)(jax.random.key(1), jnp.zeros((1, 8, WIDTH)))

    def run(params, x, ids, cotangent):
        segments = Segments.from_ids(ids, single=not config.supports_packing)
        y, pullback = jax.vjp(lambda p, x: backbone.apply(p, x, segments=segments)[0], params, x)
        return y, pullback(cotangent)

    expected = jax.jit(run)(params, x, ids, cotangent)
    data = 1 if shards == 8 else 2
    mesh = make_mesh(data, seq=shards, devices=jax.devices()[: data * shards])
    tokens = jax.device_put((x, ids, cotangent), token_sharding(mesh))
    params = jax.device_put(params, replicated(mesh))
    y, gradients = jax.jit(on_mesh(run, mesh))(params, *tokens)
    testing.assert_close(y, expected[0], tolerances.FLOAT32)
    testing.assert_close(gradients, expected[1], tolerances.FLOAT32_SPLIT_GRADIENTS)


CARRYING = ("rg_lru",)


def test_training_steps_are_those_of_one_device():
    """Two steps with a carried state, of rows whose weights differ and whose length is padded."""
    # Adam divides a gradient by its own size: of what is all rounding, nothing is left to compare.
    config = TrainConfig(batch_size=4, steps=4, learning_rate=1e-2, clip_norm=1.0, adam_eps=1e-3)
    backbone = BackboneConfig(
        layout=CARRYING, mixers=tuple(CASES[name] for name in CARRYING), width=WIDTH, dropout=0.1
    )
    model = LanguageModel(LanguageModelConfig(vocabulary_size=VOCABULARY, backbone=backbone))
    task = language(model, lambda p: param_labels(backbone, p), carry_state=True, tile=8)
    short = {key: x[:, :22] for key, x in batch().items()}

    def steps(mesh):
        state = create_state(task, config, mesh)
        step = make_train_step(task, optimizer_of(task, config), mesh)
        measured = []
        for rows in (short, batch()):
            state, metrics = step(state, put_batch(rows, mesh), jnp.asarray(True))
            measured.append((metrics.sums, metrics.grad_norm))
        return jax.tree.map(np.asarray, (state.params, state.carry, measured))

    one = steps(make_mesh(devices=jax.devices()[:1]))
    testing.assert_close(steps(make_mesh(2, seq=4)), one, tolerances.FLOAT32_TRAINED)


@pytest.mark.parametrize("name", one_of_many(STATEFUL, ["attention"]))
def test_a_state_goes_on_over_a_split_length(name):
    """Two calls, of which the second begins inside documents: outputs and states of one device."""
    config = CASES[name]
    backbone = Backbone(BackboneConfig(layout=(config.mixer,), mixers=(config,), width=WIDTH))
    x = np.random.default_rng(0).standard_normal((4, LENGTH, WIDTH)).astype(np.float32)
    ids = np.maximum(batch()["segment_ids"], 1)  # no padding: every document may go on
    ids = ids if config.supports_packing else np.ones_like(ids)
    params = jax.jit(backbone.init)(jax.random.key(1), jnp.zeros((1, 8, WIDTH)))

    def run(params, x, ids):
        state = backbone.initial_state(4, max_length=2 * LENGTH, dtype=jnp.float32)
        outputs = []
        for _ in range(2):
            segments = Segments.from_ids(ids, single=not config.supports_packing)
            y, state = backbone.apply(params, x, segments=segments, state=state)
            outputs.append(y)
            ids = jnp.broadcast_to(ids[:, -1:], ids.shape)
        return outputs, state

    expected = jax.jit(run)(params, x, ids)
    mesh = make_mesh(2, seq=3, devices=jax.devices()[:6])
    tokens = jax.device_put((x, ids), token_sharding(mesh))
    actual = jax.jit(on_mesh(run, mesh))(jax.device_put(params, replicated(mesh)), *tokens)
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)
