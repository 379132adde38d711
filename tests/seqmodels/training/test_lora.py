"""Low-rank adapters: what is trained, what stays, what the optimizer keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.mixers import MambaConfig
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig, param_labels
from seqmodels.parallel import make_mesh, put_batch
from seqmodels.training.config import TrainConfig
from seqmodels.training.language import language
from seqmodels.training.lora import ADAPTERS, BASE, LoRAConfig, adapted, adapted_paths, merged
from seqmodels.training.state import create_state, optimizer_of
from seqmodels.training.step import make_train_step
from tests import tolerances

BACKBONE = BackboneConfig(
    layout=("mamba",) * 2, mixers=(MambaConfig(state_size=3),), width=8, norm="rms", mlp=12
)
MODEL = LanguageModelConfig(BACKBONE, vocabulary_size=11, embedding_std=1.0)
CONFIG = LoRAConfig(rank=2, alpha=6.0, layers=("in_proj", "mlp_in"))
TRAIN = TrainConfig(learning_rate=0.05, steps=8, batch_size=8, warmup_steps=0)


def plain():
    return language(LanguageModel(MODEL), lambda p: param_labels(MODEL, p), packed=False)


def batch():
    tokens = np.random.default_rng(0).integers(0, 11, (8, 17)).astype(np.int32)
    weights = np.ones((8, 16), np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def test_layers_by_name_and_all_dense_ones():
    params = plain().init(jax.random.key(0))["params"]
    assert {path[-2] for path in adapted_paths(params, CONFIG)} == {"in_proj", "mlp_in"}
    names = {path[-2] for path in adapted_paths(params, LoRAConfig())}
    assert names == {"in_proj", "x_proj", "dt_proj", "out_proj", "mlp_in", "mlp_out"}
    with pytest.raises(ValueError, match=r"layers=\('conv1d',\) must be dense layers .* in_proj"):
        adapted_paths(params, LoRAConfig(layers=("conv1d",)))


def test_the_adapted_model_begins_as_the_plain_one_and_adds_products():
    task, one = adapted(plain(), CONFIG), plain()
    variables = task.init(jax.random.key(0))
    params = variables["params"]
    jax.tree.map(np.testing.assert_array_equal, params[BASE], one.init(jax.random.key(0))["params"])
    sums, expected = (
        jax.jit(t.loss)(v, batch(), None, None)[0]
        for t, v in ((task, variables), (one, {"params": params[BASE]}))
    )
    testing.assert_close(sums, expected, 0.0)
    moved = jax.tree.map(lambda leaf: leaf + 0.5, params[ADAPTERS])
    whole = merged(params[BASE], moved, CONFIG)
    block, parts = (
        tree["backbone"]["block_1"]["mlp_in"]["kernel"] for tree in (params[BASE], moved)
    )
    testing.assert_close(
        whole["backbone"]["block_1"]["mlp_in"]["kernel"],
        block + 3.0 * np.asarray(parts["a"]) @ np.asarray(parts["b"]),
        tolerances.FLOAT32,
    )
    assert whole["backbone"]["block_1"]["mlp_out"] == params[BASE]["backbone"]["block_1"]["mlp_out"]


@pytest.mark.full("sizes1")
@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "model": 2}])
def test_training_moves_the_adapters_alone_and_keeps_nothing_of_the_base(sizes):
    task = adapted(plain(), CONFIG)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = make_mesh(**sizes, devices=devices)
    state = create_state(task, TRAIN, mesh)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params[ADAPTERS]))
    before = jax.device_get(state.params)
    step = make_train_step(task, optimizer_of(task, TRAIN), mesh)
    losses = []
    for _ in range(8):
        state, metrics = step(state, put_batch(batch(), mesh), jnp.asarray(True))
        losses.append(float(metrics.sums.loss))
    assert losses[-1] < 0.9 * losses[0]
    after = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, after[BASE], before[BASE])
    moved = jax.tree.map(lambda a, b: np.any(a != b), after[ADAPTERS], before[ADAPTERS])
    assert all(jax.tree.leaves(moved))
