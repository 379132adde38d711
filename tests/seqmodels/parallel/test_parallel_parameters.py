"""Parameters over the devices of a mesh: who has what, and steps that equal those of one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.tools import aot, testing
from seqmodels import ops
from seqmodels.mixers import GLAConfig, MambaConfig
from seqmodels.models import (
    Backbone,
    BackboneConfig,
    LanguageModel,
    LanguageModelConfig,
    param_axes,
    param_labels,
)
from seqmodels.parallel import RULES, make_mesh, on_mesh, put_batch, token_sharding
from seqmodels.parallel.parameters import partition
from seqmodels.training.config import TrainConfig
from seqmodels.training.language import language
from seqmodels.training.state import abstract_state, create_state, optimizer_of
from seqmodels.training.step import make_train_step
from tests import tolerances
from tests.pallas_kernels.absent import needs_compiler
from tests.seqmodels.mixers.cases import CASES, KINDS
from tests.seqmodels.parallel.hlo import collectives
from tests.seqmodels.parallel.test_sharded_models import CAUSAL, VOCABULARY, WIDTH, batch
from tests.tiers import one_of_many


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        (P("embed", "inner"), (16, 8), (2, 2, 2), P(("data", "seq"), "model")),
        (P("inner", "embed"), (16, 8), (4, 2, 1), P("model", "data")),
        # What does not divide its own axis goes to the largest other one.
        (P("vocab", "embed"), (11, 8), (2, 2, 2), P(None, ("data", "seq", "model"))),
        (P("embed", "inner"), (6, 8), (2, 1, 4), P("data", "seq")),
        (P(), (3, 16, 5), (2, 2, 2), P(None, ("data", "model", "seq"), None)),
        (P("inner"), (3, 5), (2, 2, 2), P(None, None)),
        # Vectors are whole, and so is the axis of a scan.
        (P(), (16,), (2, 2, 2), P(None)),
        (P("layers"), (8, 16), (2, 2, 2), P(None, None)),
        (P("layers", "embed", "mlp"), (8, 2, 6), (2, 2, 2), P(None, "data", "model")),
    ],
)
def test_an_axis_goes_where_the_table_says(axes, shape, sizes, expected):
    assert partition(axes, shape, make_mesh(*sizes)) == expected


def shapes_of(config):
    model = Backbone(config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8))))["params"]


@pytest.mark.parametrize("name", one_of_many(CASES, KINDS - {"s4", "s5"}))
def test_every_matrix_has_named_axes(name):
    config = BackboneConfig(
        layout=(CASES[name].mixer,) * 2,
        mixers=(CASES[name],),
        width=8,
        mlp=16,
        mlp_kind="swiglu",
        gate="full_glu",
        scan_layers=True,
    )
    params = shapes_of(config)
    for path, axes in jax.tree.leaves_with_path(param_axes(config, params)):
        scanned = path[0].key == "period"
        leaf = functools.reduce(lambda tree, entry: tree[entry.key], path, params)
        assert len(axes) <= leaf.ndim
        assert scanned == (axes[:1] == ("layers",))
        names = {*axes} - {None, "layers"}
        assert names <= set(RULES)
        if leaf.ndim - scanned > 1:
            assert names, jax.tree_util.keystr(path)


def model_of(config, width, layers=2, **options):
    backbone = BackboneConfig(
        layout=(config.mixer,) * layers, mixers=(config,), width=width, norm="rms", **options
    )
    return LanguageModel(LanguageModelConfig(vocabulary_size=VOCABULARY, backbone=backbone))


def task_of(model, **options):
    return language(model, functools.partial(param_labels, model.config), tile=8, **options)


@pytest.mark.parametrize(
    "sizes", one_of_many([((2, 2, 2),), ((8, 1, 1),), ((1, 1, 8),)], [((2, 2, 2),)])
)
def test_a_device_has_its_part_of_all_that_is_kept_of_parameters(sizes):
    mesh = make_mesh(*sizes)
    config = TrainConfig(batch_size=8, ema_decay=0.9)
    task = task_of(model_of(MambaConfig(), 64, mlp=128, scan_layers=True))
    state = abstract_state(task, config, mesh)
    for part in (state.params, state.opt_state, state.average):
        leaves = jax.tree.leaves(part)
        total = sum(x.size for x in leaves)
        here = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
        small = sum(x.size for x in leaves if x.ndim < 2 or x.size < 8 * 64)
        assert here <= total / 8 + small + max(x.size for x in leaves) / 64
        assert here < total / 5


def steps(name, mesh, config, **options):
    """The state after two steps."""
    layers = 1 if name in AMPLIFYING else 2
    model = model_of(CASES[name], WIDTH, layers=layers, mlp=12, **options)
    task = task_of(model, packed=CASES[name].supports_packing)
    state = create_state(task, config, mesh)
    step = make_train_step(task, optimizer_of(task, config), mesh)
    for _ in range(2):
        state, metrics = step(state, put_batch(batch(), mesh), jnp.asarray(True))
    # The gradients are in Adam's moments.
    return {"params": state.params, "moments": state.opt_state, "sums": metrics.sums}


# Adam divides a gradient by its own size: of what is all rounding, nothing is left to compare.
CONFIG = TrainConfig(batch_size=4, steps=4, learning_rate=1e-2, adam_eps=1e-3)

# The norms of their heads of a few channels amplify rounding, and two layers do so twice.
AMPLIFYING = {
    "gla", "retnet", "lightning", "kda", "attention-gated", "mamba3-rank", "mom", "mom-gla",
}  # fmt: skip
# A model axis of 2 does not divide their heads.
ODD = {
    "sliding_window-sinks", "rat-chunks-of-one", "scout-mamba", "scout-window",
    "parallel-attention",
}  # fmt: skip
HEADS = [name for name in CAUSAL if name not in ODD]


@pytest.mark.full
@pytest.mark.parametrize("name", one_of_many(HEADS, ["gla"]))
def test_a_step_is_that_of_one_device_shard_by_shard(name):
    actual = steps(name, make_mesh(2, 2, 2), CONFIG)
    assert_shards_close(actual, steps(name, make_mesh(devices=jax.devices()[:1]), CONFIG))


@pytest.mark.full
@pytest.mark.parametrize("options", [{"mlp_tile": 5}, {"remat": "full"}, {"scan_layers": True}])
def test_what_saves_memory_does_so_on_a_mesh(options):
    actual = steps("lru", make_mesh(2, 2, 2), CONFIG, **options)
    one = make_mesh(devices=jax.devices()[:1])
    assert_shards_close(actual, steps("lru", one, CONFIG, scan_layers="scan_layers" in options))


def assert_shards_close(actual, expected):
    for (path, x), y in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        scale = float(np.sqrt(np.mean(np.square(np.asarray(y, np.float64))))) or 1.0
        for shard in x.addressable_shards:
            error = np.asarray(shard.data, np.float64) - np.asarray(y)[shard.index]
            ratio = float(np.sqrt(np.mean(np.square(error)))) / scale
            message = f"{jax.tree_util.keystr(path)}{shard.index}: {ratio:.1e}"
            assert ratio <= tolerances.FLOAT32_SPLIT_GRADIENTS, message


@pytest.mark.full
def test_what_moves_for_parameters_does_not_grow_with_the_length():
    """Without a model axis; and each device keeps its part alone between two steps."""
    config, mesh = TrainConfig(batch_size=4), make_mesh(2, seq=4)
    task = task_of(model_of(GLAConfig(heads=2), 32, mlp=64, scan_layers=True), packed=False)
    step = make_train_step(task, optimizer_of(task, config), mesh)
    state = abstract_state(task, config, mesh)

    def moved(length):
        tokens = np.zeros((4, length), np.int32)
        rows = {"inputs": tokens, "targets": tokens, "weights": np.ones((4, length), np.float32)}
        return collectives(step, state, put_batch(rows, mesh), jnp.asarray(True))

    short = moved(128)
    assert moved(256) == short
    # Each matrix of a layer: gathered forward and backward, its gradient summed.
    assert short["all-gather"][0] >= 2 * 8


def test_heads_that_do_not_divide_are_refused_before_anything_is_compiled():
    mesh = make_mesh(2, model=4)
    q, beta = jnp.ones((2, 8, 6, 4)), jnp.ones((2, 8, 6))
    for op in (ops.linear_attention, lambda q, k, v: ops.delta_rule(q, k, v, beta), ops.attention):
        with pytest.raises(
            ValueError,
            match=r"6 heads do not divide over the mesh's model axis of 4; use model=3, or 8 heads",
        ):
            jax.eval_shape(on_mesh(lambda op=op: op(q, q, q), mesh))
    q, k = jnp.ones((2, 8, 12, 4)), jnp.ones((2, 8, 6, 4))
    jax.eval_shape(on_mesh(lambda: ops.attention(q, k, k), mesh))


@pytest.mark.full
def test_tpu_kernels_compile_for_heads_and_a_row_over_four_chips():
    needs_compiler("v5e")
    mesh = make_mesh(1, model=2, seq=2, devices=aot.topology("v5e").devices)

    def loss(q, k, v, log_decay):
        return jnp.sum(ops.linear_attention(q, k, v, log_decay)[0])

    where = token_sharding(mesh)
    heads = jax.ShapeDtypeStruct((1, 1024, 4, 128), jnp.float32, sharding=where)
    decay = jax.ShapeDtypeStruct((1, 1024, 4), jnp.float32, sharding=where)
    gradient = jax.jit(on_mesh(jax.grad(loss, (0, 1, 2, 3)), mesh))
    program = gradient.lower(heads, heads, heads, decay).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.full
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_keys_are_shared_as_they_are_on_one_device(groups):
    rng = np.random.default_rng(0)
    q, o = (rng.standard_normal((2, 16, 8, 4)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((2, 16, groups, 4)).astype(np.float32) for _ in range(2))

    def run(q, k, v, o):
        outputs, pullback = jax.vjp(ops.attention, q, k, v)
        return outputs, pullback(o)

    mesh = make_mesh(1, model=4, seq=2)
    split = jax.jit(on_mesh(run, mesh))(*jax.device_put((q, k, v, o), token_sharding(mesh)))
    testing.assert_close(split, jax.jit(run)(q, k, v, o), tolerances.FLOAT32)
