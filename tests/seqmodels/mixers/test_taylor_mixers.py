"""Based and prefix linear attention (JRT) against the matrices that they apply to their values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.layers.feature_maps import taylor, taylor_features
from seqmodels.mixers import BasedConfig, JRTConfig, Segments, build
from seqmodels.mixers.jrt import JRT_RNN_1_3B, JRT_RNN_360M
from tests import tolerances
from tests.seqmodels.mixers import matrix_oracle, oracles
from tests.seqmodels.mixers.matrix_oracle import heads

WIDTH, LENGTH = 6, 11
SIZES = {"heads": 2, "feature_size": 3, "init_std": 0.5}


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_inner_products_of_features_are_the_expansion_of_the_exponential(size):
    q, k = np.random.default_rng(0).normal(size=(2, 7, size)).astype(np.float32)
    features = taylor(jnp.asarray(q))
    assert features.shape == (7, taylor_features(size))
    scores = np.sum(q.astype(np.float64) * k, axis=-1) / np.sqrt(size)
    actual = jnp.sum(features * taylor(jnp.asarray(k)), axis=-1)
    np.testing.assert_allclose(
        actual, 1 + scores + scores**2 / 2, **tolerances.EACH_FLOAT32_NEAR_ONE
    )


def kernel(q, k):
    """``1 + s + s^2 / 2`` of every query and key, ``(H, L, L)``."""
    scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
    return 1 + scores + scores**2 / 2


def mixed(p, weights, values):
    """Each head's values under its matrices ``(H, L, L)``, which stand side by side; projected."""
    total = sum(matrix.sum(axis=-1) for matrix in weights)
    o = sum(np.einsum("hts,shv->thv", m, v) for m, v in zip(weights, values, strict=True))
    return (o / total.T[..., None]).reshape(len(o), -1) @ p["o_proj/kernel"]


def test_based():
    config = BasedConfig(**SIZES)
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    past = np.tril(np.ones((LENGTH, LENGTH)))
    for x, y in zip(inputs, outputs, strict=True):
        q, k, v = (heads(x @ p[f"{name}_proj/kernel"], 2) for name in "qkv")
        oracles.assert_close(y, mixed(p, [kernel(q, k) * past], [v]))


@pytest.mark.parametrize("prefix", [1, 4, 30])
def test_jrt(prefix):
    config = JRTConfig(**SIZES, prefix=prefix)
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    past, encoded = np.tril(np.ones((LENGTH, LENGTH))), np.arange(LENGTH) < prefix
    for x, y in zip(inputs, outputs, strict=True):
        q, k, v, k2, v2 = (
            heads(x @ p[f"{name}_proj/kernel"], 2)
            for name in ("q", "k", "v", "k_encoder", "v_encoder")
        )
        weights = [kernel(q, k) * past, kernel(q, k2) * encoded]
        oracles.assert_close(y, mixed(p, weights, [v, v2]))


def layer(prefix):
    mixer = build(JRTConfig(**SIZES, prefix=prefix), WIDTH)
    x = jax.random.normal(jax.random.key(1), (2, 24, WIDTH))
    return jax.jit(mixer.apply), jax.jit(mixer.init)(jax.random.key(0), x), x


def test_a_prefix_sees_itself_and_nothing_behind_it():
    run, variables, x = layer(8)
    y, _ = run(variables, x)
    for at, first in ((5, 0), (8, 8), (13, 13)):
        z, _ = run(variables, x.at[:, at].add(1.0))
        changed = np.any(np.asarray(y != z), axis=(0, 2))
        assert np.flatnonzero(changed)[0] == first


def test_packed_prompts_are_separate_ones_with_gradients():
    run, variables, x = layer(5)
    ids = jnp.asarray([[1] * 9 + [2] * 3 + [3] * 8 + [0] * 4, [4] * 24])

    def packed(variables, x):
        return run(variables, x, segments=Segments.from_ids(ids))[0]

    def apart(variables, x):
        rows = [x[:1, :9], x[:1, 9:12], x[:1, 12:20], x[1:]]
        parts = [run(variables, row)[0] for row in rows]
        first = jnp.concatenate([*parts[:3], jnp.zeros_like(x[:1, :4])], axis=1)
        return jnp.concatenate([first, parts[3]])

    def both(way):
        def loss(*args):
            y = way(*args)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, x)

    (one, y), (two, z) = both(packed), both(apart)
    testing.assert_close(y, z, tolerances.FLOAT32)
    testing.assert_close(one, two, tolerances.FLOAT32_MIXER_GRADIENTS)
    single = Segments.from_ids(jnp.asarray([[1] * 20 + [0] * 4, [4] * 24]), single=True)
    several = dataclasses.replace(single, single=False)
    one, two = (run(variables, x, segments=segments) for segments in (single, several))
    testing.assert_close(one, two, tolerances.FLOAT32)


def test_a_prompt_is_read_whole_and_decoded_behind():
    """Pieces that begin with the prefix give what the whole does; packed rows end in its state."""
    run, variables, x = layer(6)
    y, state = run(variables, x)
    ids = jnp.asarray([[7] * 5 + [1] * 7, [1] * 12])
    moved = jnp.concatenate([x[:, -5:], x[:, :7]], axis=1).at[1].set(x[1, :12])
    for start in (
        run(variables, x[:, :7])[1],
        run(variables, moved, segments=Segments.from_ids(ids))[1],
    ):
        cut = np.asarray(start.position)
        assert cut[0] == 7
        parts, after = [], start
        for t in range(7, 24):
            piece = jnp.stack([x[0, t], x[1, min(t + cut[1] - 7, 23)]])[:, None]
            part, after = run(variables, piece, state=after)
            parts.append(part[0])
        testing.assert_close(jnp.concatenate(parts), y[0, 7:], tolerances.FLOAT32)
        testing.assert_close(
            after.state["recurrent_state"][0], state.state["recurrent_state"][0], tolerances.FLOAT32
        )


def test_published_sizes_and_refusals():
    for published in (JRT_RNN_360M, JRT_RNN_1_3B):
        width = published.width
        assert matrix_oracle.count(published) == 3 * width**2 + 3 * 256 * width
    with pytest.raises(ValueError, match=r"heads=1 of 256 channels .* narrower than 256"):
        oracles.shapes(BasedConfig(heads=1), 256)
