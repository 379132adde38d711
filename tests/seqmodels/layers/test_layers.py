"""Norms, gates, dropout and embedding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqmodels.layers.dropout import Dropout
from seqmodels.layers.embedding import Embedding
from seqmodels.layers.gates import Gate
from seqmodels.layers.norms import BatchNorm, Norm
from tests import tolerances

X = jnp.asarray(np.random.default_rng(0).normal(1.0, 2.0, (3, 5, 4)).astype(np.float32))
MASK = jnp.asarray(np.arange(5)[None] < np.array([[5], [2], [0]]))


def trained(norm, x, mask, stats=None):
    variables = norm.init(jax.random.key(1), x, deterministic=True)
    variables = variables if stats is None else variables | {"batch_stats": stats}
    y, updates = norm.apply(variables, x, mask, deterministic=False, mutable=["batch_stats"])
    return y, variables, updates["batch_stats"]


def test_batch_norm_matches_flax():
    y, _, stats = trained(BatchNorm(momentum=0.9), X, MASK)
    flax_norm = nn.BatchNorm(use_running_average=False, momentum=0.9)
    variables = flax_norm.init(jax.random.key(1), X)
    expected, updates = flax_norm.apply(variables, X, mask=MASK[..., None], mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, **tolerances.EACH_FLOAT32_LAYER)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_SUM),
        stats,
        updates["batch_stats"],
    )


def test_batch_norm_statistics_are_those_of_the_real_tokens():
    norm = BatchNorm(momentum=0.0)
    real = np.asarray(X)[np.asarray(MASK)]
    y, variables, stats = trained(norm, X, MASK)
    np.testing.assert_allclose(
        np.asarray(y)[np.asarray(MASK)].mean(0), 0, **tolerances.EACH_FLOAT32_FLIPPED
    )
    np.testing.assert_allclose(
        np.asarray(y)[np.asarray(MASK)].var(0), 1, **tolerances.EACH_FLOAT32_TOTAL
    )
    np.testing.assert_allclose(stats["mean"], real.mean(0), **tolerances.EACH_FLOAT32_SUM)
    np.testing.assert_allclose(stats["var"], real.var(0), **tolerances.EACH_FLOAT32_SUM)
    later = norm.apply(variables | {"batch_stats": stats}, X, deterministic=True)
    np.testing.assert_allclose(
        np.asarray(later)[np.asarray(MASK)],
        np.asarray(y)[np.asarray(MASK)],
        **tolerances.EACH_FLOAT32_OUTPUT,
    )


def test_batch_norm_ignores_what_padding_holds():
    dirty = jnp.where(MASK[..., None], X, jnp.inf)
    clean, _, stats = trained(BatchNorm(), X, MASK)
    y, _, dirty_stats = trained(BatchNorm(), dirty, MASK)
    np.testing.assert_array_equal(
        np.asarray(y)[np.asarray(MASK)], np.asarray(clean)[np.asarray(MASK)]
    )
    jax.tree.map(np.testing.assert_array_equal, stats, dirty_stats)


def test_batch_norm_keeps_its_statistics_on_a_batch_of_padding():
    before = {"mean": jnp.arange(4.0), "var": jnp.arange(4.0) + 1.0}
    y, _, after = trained(BatchNorm(), X, jnp.zeros_like(MASK), before)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert np.all(np.isfinite(y))


def test_batch_norm_is_global_over_a_mesh():
    mesh = jax.make_mesh((2, 2), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(3), (4, 6, 4))
    mask = jnp.arange(6)[None] < jnp.array([[6], [2], [4], [1]])
    norm = BatchNorm()
    variables = norm.init(jax.random.key(1), x, deterministic=True)

    @jax.jit
    def run(x, mask):
        return norm.apply(variables, x, mask, deterministic=False, mutable=["batch_stats"])

    spec = NamedSharding(mesh, PartitionSpec("data", "seq"))
    sharded = run(jax.device_put(x, spec), jax.device_put(mask, spec))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_LAYER),
        sharded,
        run(x, mask),
    )


@pytest.mark.parametrize("kind", ["batch", "layer", "rms"])
def test_norm_kinds(kind):
    norm = Norm(kind)
    variables = norm.init(jax.random.key(0), X, MASK, deterministic=True)
    assert set(variables["params"]) == {kind}
    y, _ = norm.apply(variables, X, MASK, deterministic=False, mutable=["batch_stats"])
    if kind == "rms":
        np.testing.assert_allclose(np.mean(np.square(y), -1), 1, **tolerances.EACH_FLOAT32_TOTAL)
    if kind == "layer":
        np.testing.assert_allclose(np.mean(y, -1), 0, **tolerances.EACH_FLOAT32_OUTPUT)


@pytest.mark.parametrize("kind", ["batch", "layer", "rms", "zero_centered_rms"])
def test_norms_add_epsilon_to_the_square(kind):
    x = 1e-2 * jax.random.normal(jax.random.key(0), (2, 3, 4))
    norm = Norm(kind, epsilon=1e-3)
    variables = norm.init(jax.random.key(0), x, deterministic=True)
    scale = np.array([0.5, -1.0, 2.0, 0.25], np.float32)
    params = {kind: {**variables["params"][kind], "scale": jnp.asarray(scale)}}
    y, _ = norm.apply({"params": params}, x, deterministic=False, mutable=["batch_stats"])
    x = np.asarray(x)
    axes = (0, 1) if kind == "batch" else (-1,)
    centre = x.mean(axes, keepdims=True) if kind in ("batch", "layer") else 0.0
    square = np.square(x - centre).mean(axes, keepdims=True)
    gain = 1.0 + scale if kind == "zero_centered_rms" else scale
    expected = gain * (x - centre) / np.sqrt(square + 1e-3)
    np.testing.assert_allclose(y, expected, **tolerances.EACH_FLOAT32_STEP)


def test_a_zero_centered_scale_starts_at_zero():
    variables = Norm("zero_centered_rms").init(jax.random.key(0), X, MASK, deterministic=True)
    np.testing.assert_array_equal(variables["params"]["zero_centered_rms"]["scale"], 0.0)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", ["half_glu1", "half_glu2", "full_glu", "gelu", "glu"])
def test_gates(kind):
    gate = Gate(kind)
    params = gate.init(jax.random.key(0), X)["params"] if kind != "gelu" else {}
    params = jax.tree.map(lambda p: p + 0.1, params)
    y = np.asarray(X, np.float64)
    z = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

    def dense(name):
        return z @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])

    expected = {
        "half_glu1": lambda: z * _sigmoid(dense("gate")),
        "half_glu2": lambda: y * _sigmoid(dense("gate")),
        "full_glu": lambda: dense("value") * _sigmoid(dense("gate")),
        "gelu": lambda: z,
        "glu": lambda: dense("gate")[..., :4] * _sigmoid(dense("gate")[..., 4:]),
    }[kind]()
    np.testing.assert_allclose(
        gate.apply({"params": params}, X), expected, **tolerances.EACH_FLOAT32_LAYERS
    )


def test_dropout_shares_its_mask_over_time():
    x = jnp.ones((2, 6, 32))
    drop = Dropout(0.5, deterministic=False)
    y = np.asarray(drop.apply({}, x, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert np.any(y[0] != y[1])
    np.testing.assert_array_equal(Dropout(0.5, deterministic=True).apply({}, x), x)


def test_gate_drops_only_in_training():
    kept = Gate("half_glu1", dropout=0.5, deterministic=True)
    variables = kept.init(jax.random.key(0), X)
    plain = Gate("half_glu1").apply(variables, X)
    np.testing.assert_array_equal(kept.apply(variables, X), plain)
    dropped = Gate("half_glu1", dropout=0.5, deterministic=False).apply(
        variables, X, rngs={"dropout": jax.random.key(1)}
    )
    assert np.any(np.all(np.asarray(dropped) == 0, axis=1))


def test_embedding():
    embedding = Embedding(300, 64, 0.5)
    tokens = np.array([[1, 299], [0, 1]])
    variables = embedding.init(jax.random.key(0), tokens)
    table = variables["params"]["embedding"]
    np.testing.assert_array_equal(embedding.apply(variables, tokens), np.asarray(table)[tokens])
    np.testing.assert_allclose(np.std(table), 0.5, rtol=0.05)
    assert np.all(np.isnan(embedding.apply(variables, np.array([[300]]))))


def test_batch_norm_has_the_gradients_of_its_definition():
    def definition(x, params):
        kept = jnp.where(MASK[..., None], x, 0.0)
        count = MASK.sum(dtype=x.dtype)
        mean = kept.sum((0, 1)) / count
        centred = jnp.where(MASK[..., None], x - mean[None, None], 0.0)
        var = (centred**2).sum((0, 1)) / count
        unit = (x - mean[None, None]) / jnp.sqrt(var + 1e-5)[None, None]
        return unit * params["scale"][None, None] + params["bias"][None, None], mean, var

    def layer(x, params):
        variables = {"params": params, "batch_stats": before}
        y, updates = norm.apply(variables, x, MASK, deterministic=False, mutable=["batch_stats"])
        return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"]

    norm, before = BatchNorm(momentum=0.0), {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    keys = jax.random.split(jax.random.key(7), 5)
    params = {"scale": jax.random.normal(keys[0], (4,)), "bias": jax.random.normal(keys[1], (4,))}
    cotangents = (
        jax.random.normal(keys[2], X.shape),
        jax.random.normal(keys[3], (4,)),
        jax.random.normal(keys[4], (4,)),
    )
    expected = jax.vjp(definition, X, params)[1](cotangents)
    actual = jax.vjp(layer, X, params)[1](cotangents)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_LAYERS),
        actual,
        expected,
    )
