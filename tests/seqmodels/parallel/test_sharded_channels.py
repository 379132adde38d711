"""Operators on whole channels, and those that run backwards, where the length is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels import ops
from seqmodels.parallel import batch_sharding, make_mesh, on_mesh, replicated, token_sharding
from seqmodels.segments import Segments
from tests.seqmodels.parallel.hlo import collectives

LENGTH = 24


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def gradients(function, mesh, specs, arguments, cotangent, exchange=None):
    def run(arguments, cotangent):
        y, pullback = jax.vjp(lambda x: function(*x), arguments)
        return y, pullback(cotangent)[0]

    expected = jax.jit(run)(arguments, cotangent)
    shardings = jax.tree.map(lambda spec: spec(mesh), specs)
    placed = jax.device_put((arguments, cotangent), shardings)
    split = jax.jit(on_mesh(run, mesh, exchange))
    return split(*placed), expected, collectives(split, *placed)


@pytest.mark.parametrize(
    "width", [6, 4]
)  # over three shards: two channels each, and two, two, none
def test_a_long_convolution_changes_places_with_channels(width):
    mesh = make_mesh(2, seq=3, devices=jax.devices()[:6])
    arguments = normal(2, LENGTH, width), normal(width, LENGTH), normal(width, 5)
    specs = (token_sharding, replicated, replicated), token_sharding
    actual, expected, moved = gradients(
        lambda u, kernel, back: ops.long_conv(u, kernel, kernel_reverse=back),
        *(mesh, specs, arguments, normal(2, LENGTH, width)),
    )
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)
    assert moved["all-to-all"][0] == 4


@pytest.mark.parametrize("width", [None, 4])
def test_real_tokens_of_a_row_are_turned(width):
    mesh = make_mesh(2, seq=3, devices=jax.devices()[:6])
    ids = np.asarray([[1] * 9 + [2] * 15, [1] * 7 + [2] * 4 + [0] * 13], np.int32)
    x = np.arange(2 * LENGTH * (width or 1)).reshape(2, LENGTH, *([] if width is None else [width]))

    def turned(x, ids):
        return ops.flip(x, Segments.from_ids(ids))

    actual = jax.jit(on_mesh(turned, mesh))(*jax.device_put((x, ids), token_sharding(mesh)))
    for row, y, real in zip(x, actual, (24, 11), strict=True):
        np.testing.assert_array_equal(y, np.concatenate([row[:real][::-1], row[real:]]))


@pytest.mark.full
def test_linear_attention_runs_backwards():
    mesh = make_mesh(1, seq=8)
    ids = np.asarray([[1] * 9 + [2] * 15, [1] * 7 + [2] * 4 + [0] * 13], np.int32)
    ids = jax.device_put(ids, token_sharding(mesh))

    def backwards(k, v, g, state):
        segments = Segments.from_ids(ids)
        return ops.linear_attention(
            k, k, v, g, initial_state=state, segments=segments, reverse=True
        )

    k, v, state = normal(2, LENGTH, 1, 4), normal(2, LENGTH, 2, 3), normal(2, 2, 4, 3)
    arguments = k, v, -0.02 * jax.nn.sigmoid(normal(2, LENGTH, 2)), state
    specs = (*(token_sharding,) * 3, batch_sharding), (token_sharding, batch_sharding)
    actual, expected, _ = gradients(
        *(backwards, mesh, specs, arguments, (normal(2, LENGTH, 2, 3), normal(2, 2, 4, 3)))
    )
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)

    def token_by_token(ids, k, v, g, state):
        outputs, states, before = [], np.asarray(state), 0
        for t in reversed(range(len(ids))):
            if ids[t]:
                if before not in (0, ids[t]):
                    states = np.zeros_like(states)
                before = ids[t]
                kv = k[t, 0][None, :, None] * v[t][:, None]
                states = np.exp(g[t])[:, None, None] * states + kv
            outputs.append(np.einsum("k,hkv->hv", k[t, 0], states) / 2 * (ids[t] != 0))
        return np.stack(outputs[::-1]), states

    for row in range(2):
        parts = (np.asarray(x[row]) for x in (ids, *arguments))
        y, final = token_by_token(*parts)
        testing.assert_close(
            (actual[0][0][row], actual[0][1][row]), (y, final), testing.FLOAT32_TOLERANCE
        )
