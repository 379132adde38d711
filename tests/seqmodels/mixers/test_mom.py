"""MoM against one recurrence a memory, over the tokens that take it; routing, capacity, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.mixers import MoMConfig, Segments, build
from seqmodels.mixers.mom import MOM_340M
from seqmodels.parallel import make_mesh, on_mesh, replicated, token_sharding
from tests import tolerances
from tests.seqmodels.mixers import matrix_oracle, oracles
from tests.seqmodels.mixers.matrix_oracle import heads, output_projection, unit

WIDTH, LENGTH = 6, 13
SIZES = {"heads": 2, "head_size": 2, "memories": 3, "init_std": 0.7}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape).astype(np.float32))


def memory(p, bank, m, x, q, config):
    """Outputs of one memory over the tokens ``x``, which all take it."""

    def convolved(part, name):
        return oracles.silu(oracles.causal_conv(part, p[f"{name}_conv/kernel"], 0.0))

    q = convolved(q, "q")
    k, v = (convolved(x @ p[f"{bank}_{name}_proj"][m], name) for name in "kv")
    q, k, v = (heads(part, 2) for part in (q, k, v))
    if config.rule == "gla":
        decay = heads(oracles.sigmoid(x @ p[f"{bank}_gk_proj"][m]) ** (1 / 16), 2)
        return matrix_oracle.attention(q, k, v, decay, config.head_size**-0.5)
    beta = oracles.sigmoid(x @ p[f"{bank}_b_proj"][m])
    step = oracles.softplus(x @ p[f"{bank}_a_proj"][m] + p["dt_bias"])
    decay = np.exp(-np.exp(p["A_log"]) * step)[..., None]
    return matrix_oracle.delta_rule(unit(q), unit(k), v, beta, decay)


@pytest.mark.parametrize(
    "config",
    [
        MoMConfig(**SIZES, chosen=2, expand_v=1.5),
        MoMConfig(**SIZES, chosen=1, rule="gla", shared=False),
        MoMConfig(**SIZES, chosen=2, capacity=0.8, conv_size=2),
    ],
)
def test_equations(config):
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    room = LENGTH
    if config.capacity is not None:
        room = int(np.ceil(config.capacity * config.chosen / config.memories * LENGTH))
    dropped = 0
    for x, y in zip(inputs, outputs, strict=True):
        shares = np.exp(x @ p["router/kernel"])
        taken = np.argsort(-shares, axis=1)[:, : config.chosen]
        q = x @ p["q_proj/kernel"]
        o = memory(p, "shared", 0, x, q, config) if config.shared else 0.0
        o = o + np.zeros((LENGTH, 2, int(config.head_size * config.expand_v)))
        for m in range(config.memories):
            tokens = np.flatnonzero((taken == m).any(axis=1))
            tokens, behind = tokens[:room], tokens[room:]
            dropped += len(behind)
            weights = shares[tokens, m] / np.take_along_axis(shares, taken, 1)[tokens].sum(axis=1)
            parts = memory(p, "routed", m, x[tokens], q[tokens], config)
            o[tokens] += weights[:, None, None] * parts
        gate = heads(x @ p["g_proj/kernel"], 2)
        oracles.assert_close(y, output_projection(o, p, oracles.silu(gate)))
    assert (dropped > 0) == (config.capacity is not None)


def test_gradients_reach_the_router_and_every_memory():
    mixer = build(MoMConfig(**SIZES), WIDTH)
    x = normal(2, LENGTH, WIDTH)
    params = jax.jit(mixer.init)(jax.random.key(0), x)["params"]

    @jax.jit
    @jax.grad
    def gradient_of(params):
        return jnp.sum(jnp.sin(mixer.apply({"params": params}, x)[0]))

    gradients = gradient_of(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        parts = gradient if path[0].key.startswith(("routed", "shared")) else gradient[None]
        assert all(np.any(part != 0) for part in parts), path


def test_the_loss_of_balance_is_that_of_experts():
    """k where all memories are taken alike; more where one is favoured; padding does not count."""
    mixer = build(MoMConfig(**SIZES, chosen=1), WIDTH)
    x = normal(1, LENGTH, WIDTH)
    params = jax.device_get(jax.jit(mixer.init)(jax.random.key(0), x)["params"])

    def loss(params, x, ids=None):
        segments = None if ids is None else Segments.from_ids(ids)
        _, sown = mixer.apply({"params": params}, x, segments=segments, mutable=["losses"])
        return sown["losses"]["load_balance"][0]

    shares = np.exp(x[0] @ params["router"]["kernel"])
    shares /= shares.sum(axis=1, keepdims=True)
    used = np.bincount(np.argmax(shares, axis=1), minlength=3) / LENGTH
    expected = 3 * np.sum(used * np.mean(shares, axis=0))
    actual, gradient = jax.jit(jax.value_and_grad(loss))(params, x)
    testing.assert_close(actual, np.float32(expected), tolerances.FLOAT32)
    assert np.any(gradient["router"]["kernel"] != 0)
    ids, padded = np.array([[1] * 8 + [0] * 5], np.int32), jax.jit(loss)
    behind = (jnp.where(ids[..., None] != 0, x, part) for part in (0.0, 9.0))
    one, two = (padded(params, part, ids) for part in behind)
    assert one == two


def test_published_size_and_refusals():
    # q, g and o; k and v of five memories.
    maps, gates = (3 + 2 * 5) * 1024**2, 5 * 2 * 4 * 1024
    rest = 4 * 1024 + 3 * 4 * 1024 + 2 * 4 + 256
    assert matrix_oracle.count(MOM_340M) == maps + gates + rest
    with pytest.raises(ValueError, match="chosen=5 must be at most memories=4"):
        MoMConfig(chosen=5)
    mixer, x = build(MoMConfig(**SIZES, capacity=1.0), WIDTH), jnp.ones((1, 4, WIDTH))
    segments = Segments.from_ids(jnp.asarray([[1, 1, 2, 2]]))
    with pytest.raises(ValueError, match="several documents a row are not supported"):
        mixer.init(jax.random.key(0), x, segments=segments)


@pytest.mark.parametrize(("model", "shards"), [(1, 2), (1, 3), (2, 1)])
def test_capacity_counts_along_the_whole_row(model, shards):
    """On a mesh outputs, windows and states are those of one device."""
    config = MoMConfig(**SIZES, capacity=0.8, rule="gla")
    mixer = build(config, WIDTH)
    x, more = normal(2, 12, WIDTH), normal(2, 6, WIDTH)
    params = jax.jit(mixer.init)(jax.random.key(0), x)

    def run(params, x, more):
        y, state = mixer.apply(params, x)
        return y, mixer.apply(params, more, state=state)

    mesh = make_mesh(2, model, shards, devices=jax.devices()[: 2 * model * shards])
    expected = jax.jit(run)(params, x, more)
    tokens = token_sharding(mesh)
    params, x, more = jax.device_put((params, x, more), (replicated(mesh), tokens, tokens))
    actual = jax.jit(on_mesh(run, mesh))(params, x, more)
    testing.assert_close(actual, expected, tolerances.FLOAT32)
