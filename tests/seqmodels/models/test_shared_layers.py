"""Blocks that read what earlier ones give, several configs of one mixer, block-diagonal MLPs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.config import from_dict, to_dict
from seqmodels.layers.monarch import BLOCKS
from seqmodels.mixers import (
    AttentionConfig,
    CrossAttentionConfig,
    GLAConfig,
    GMUConfig,
    MambaConfig,
    Segments,
    SlidingWindowConfig,
    build,
)
from seqmodels.models import Backbone, BackboneConfig, LanguageModel, LanguageModelConfig
from seqmodels.models.backbone import param_axes, param_labels
from tests import tolerances

WIDTH, LENGTH = 8, 14
HEADS = {"heads": 2, "kv_heads": 1, "rotary_base": None, "init_std": 0.5}
STACK = BackboneConfig(
    layout=("mamba", "attention", "gmu", "cross_attention"),
    mixers=(
        MambaConfig(state_size=3),
        AttentionConfig(**HEADS),
        GMUConfig(),
        CrossAttentionConfig(**HEADS),
    ),
    width=WIDTH,
    norm="rms",
    mlp=6,
)


def made(config, seed=0):
    model = LanguageModel(LanguageModelConfig(config, vocabulary_size=11, embedding_std=1.0))
    tokens = jax.random.randint(jax.random.key(seed), (2, LENGTH), 0, 11)
    return model, jax.jit(model.init)(jax.random.key(1), tokens), tokens


def test_a_memory_unit_gates_what_mamba_has_read_of_its_state():
    x, m = (
        jax.random.normal(jax.random.key(seed), (2, LENGTH, n)) for seed, n in ((0, 8), (1, 16))
    )
    mamba, unit = build(MambaConfig(state_size=3), WIDTH), build(GMUConfig(), WIDTH)
    variables = jax.jit(mamba.init)(jax.random.key(2), x)
    y, state = jax.jit(mamba.apply)(variables, x)
    z, same, memory = jax.jit(functools.partial(mamba.apply, share=True))(variables, x)
    testing.assert_close((z, same), (y, state), tolerances.FLOAT32)
    p = variables["params"]
    gate = jnp.split(x @ p["in_proj"]["kernel"], 2, axis=-1)[1]
    testing.assert_close(
        (memory * jax.nn.silu(gate)) @ p["out_proj"]["kernel"], y, tolerances.FLOAT32
    )

    variables = jax.jit(unit.init)(jax.random.key(3), x, shared=m)
    y, state = jax.jit(unit.apply)(variables, x, shared=m)
    kernels = {name: np.asarray(p["kernel"]) for name, p in variables["params"].items()}
    assert kernels["in_proj"].shape == (8, 16)
    expected = (jax.nn.silu(x @ kernels["in_proj"]) * m) @ kernels["out_proj"]
    testing.assert_close(y, expected, tolerances.FLOAT32)
    assert state is None


@pytest.mark.parametrize("cached", [False, True])
def test_queries_of_the_same_weights_find_what_the_attention_found(cached):
    options = HEADS | {"rotary_base": 1e4, "qk_norm": True, "score_scale": 0.7}
    attention = build(AttentionConfig(**options), WIDTH)
    cross = build(CrossAttentionConfig(**options), WIDTH)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    ids = np.int32([[1] * 5 + [2] * 5 + [0] * 4, [3] * LENGTH])
    params = jax.jit(attention.init)(jax.random.key(1), x)["params"]
    find = jax.jit(functools.partial(attention.apply, share=True))
    find_again = jax.jit(cross.apply)
    own = {name: params[name] for name in ("q_proj", "q_norm", "o_proj")}
    state = attention.initial_state(2, max_length=20, dtype=jnp.float32) if cached else None
    for part in (slice(0, 4), slice(4, 5), slice(5, None)):
        segments = jax.jit(Segments.from_ids)(ids[:, part])
        y, state, keys = find({"params": params}, x[:, part], segments=segments, state=state)
        z, nothing = find_again({"params": own}, x[:, part], segments=segments, shared=keys)
        testing.assert_close(z, y, tolerances.FLOAT32)
        assert nothing is None
        state = state if cached else None


def test_whole_is_in_pieces_with_one_cache_and_packed_is_apart():
    model, variables, tokens = made(STACK)
    start = model.initial_state(2, max_length=LENGTH, dtype=jnp.float32)
    assert start[2:] == (None, None)
    run = jax.jit(model.apply)
    whole, last = run(variables, tokens, state=start)
    training, _ = run(variables, tokens)
    testing.assert_close(training, whole, tolerances.FLOAT32_BOTH)
    state, parts = start, []
    for begin, end in ((0, 6), (6, 12), (12, 13), (13, LENGTH)):
        y, state = run(variables, tokens[:, begin:end], state=state)
        parts.append(y)
    testing.assert_close(jnp.concatenate(parts, axis=1), whole, tolerances.FLOAT32_BOTH)
    testing.assert_close(state, last, tolerances.FLOAT32_BOTH)
    ids = jnp.asarray([[1] * 2 + [2] * (LENGTH - 2), [3] * LENGTH])
    packed, _ = run(variables, tokens, segments=Segments.from_ids(ids))
    moved = jnp.roll(tokens, -2, axis=1)
    testing.assert_close(packed[0, 2:], run(variables, moved)[0][0, :-2], tolerances.FLOAT32_BOTH)
    later = tokens.at[:, 8].set((tokens[:, 8] + 1) % 11)
    np.testing.assert_array_equal(run(variables, later)[0][:, :8], training[:, :8])


@pytest.mark.full
def test_computing_again_changes_no_gradient():
    def gradient(config):
        model, variables, tokens = made(config)
        loss = jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, tokens)[0])))
        return jax.jit(loss)(variables)

    one, two = (gradient(dataclasses.replace(STACK, remat=kind)) for kind in ("none", "full"))
    testing.assert_close(two, one, tolerances.FLOAT32_BOTH)
    assert dataclasses.replace(STACK, scan_layers=True).repeats == 0
    assert from_dict(BackboneConfig, to_dict(STACK)) == STACK


def test_who_reads_whom():
    config = dataclasses.replace(
        STACK, layout=("mamba", "attention", "mamba", "gmu", "cross_attention", "gmu")
    )
    assert [config.source(layer) for layer in range(6)] == [None, None, None, 2, 1, 2]
    assert config.sources == {1, 2}
    with pytest.raises(ValueError, match=r"block 0, 'gmu', reads the memory of an earlier block"):
        dataclasses.replace(STACK, layout=("gmu", "mamba", "attention", "cross_attention"))
    with pytest.raises(ValueError, match="gmu mixer: it reads the memory"):
        build(GMUConfig(), WIDTH).init(jax.random.key(0), jnp.ones((1, 2, WIDTH)))
    wide = dataclasses.replace(
        STACK, mixers=(*STACK.mixers[:3], CrossAttentionConfig(heads=4, rotary_base=None))
    )
    with pytest.raises(ValueError, match=r"heads of 2 channels in kv_heads=4 groups do not fit"):
        made(wide)


def test_two_configs_of_one_mixer():
    near, far = (SlidingWindowConfig(heads=1, window=n, init_std=0.5) for n in (2, 5))
    config = BackboneConfig(
        layout=("near", "far", "near"), mixers=(near, far), names=("near", "far"), width=WIDTH,
        norm="rms", mlp=6,
    )  # fmt: skip
    assert [config.mixer(layer).window for layer in range(3)] == [2, 5, 2]
    model, variables, tokens = made(config)
    run = jax.jit(model.apply)
    y, _ = run(variables, tokens)
    other = tokens.at[:, 0].set((tokens[:, 0] + 1) % 11)
    changed = np.any(np.asarray(run(variables, other)[0] != y), axis=(0, 2))
    assert np.flatnonzero(changed).tolist() == [0, 1, 2, 3, 4, 5, 6]  # 1 + 4 + 1 tokens further
    states = model.initial_state(1)
    assert [state.state["k"].shape[1] for state in states] == [2, 5, 2]
    assert from_dict(BackboneConfig, to_dict(config)) == config
    for names, message in (
        ((), "several configs of one mixer need names"),
        (("near",), r"names=\('near',\) must have one for each of 2 mixers"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, names=names)


def test_a_block_diagonal_mlp_is_a_dense_one_with_zeros():
    config = BackboneConfig(
        layout=("gla",), mixers=(GLAConfig(heads=1, init_std=0.5),), width=WIDTH, norm="rms",
        mlp=12, mlp_kind="geglu", mlp_blocks=2,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    variables = jax.jit(Backbone(config).init)(jax.random.key(1), x)
    y, _ = jax.jit(Backbone(config).apply)(variables, x)
    params = dict(variables["params"]["block_0"])
    for name in ("mlp_in", "mlp_gate", "mlp_out"):
        first, second = params[name]["kernel"]
        whole = jax.scipy.linalg.block_diag(first, second)
        params[name] = params[name] | {"kernel": whole}
    dense = dataclasses.replace(config, mlp_blocks=1)
    z, _ = jax.jit(Backbone(dense).apply)({"params": {"block_0": params}}, x)
    testing.assert_close(y, z, tolerances.FLOAT32)
    axes = param_axes(config, variables["params"])["block_0"]
    assert axes["mlp_in"]["kernel"] == BLOCKS
    labels = param_labels(config, variables["params"])["block_0"]
    assert labels["mlp_in"]["kernel"].weight_decay
    with pytest.raises(ValueError, match="mlp_blocks=5 must divide width=8 and mlp=12"):
        dataclasses.replace(config, mlp_blocks=5)
