"""Convolutions whose windows some of the tokens enter, against one token after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels import ops
from seqmodels.parallel import batch_sharding, make_mesh, on_mesh, replicated, token_sharding
from seqmodels.segments import Segments
from tests import tolerances
from tests.tiers import one_of_many

LENGTH, CHANNELS, WIDTH = 24, 3, 5
# Documents end at a shard's edge, a token before and behind it; row 2 ends in shards of padding.
ROWS = [(24,), (7, 10, 7), (9, 2, 1), (8, 8, 8), (1, 1, 1, 21)]


def documents():
    rows = [np.repeat(np.arange(len(sizes)) + 1, sizes) for sizes in ROWS]
    return np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows]).astype(np.int32)


def in_front(ids, shards, share):
    """Tokens of which about a share are counted, in front of their document's in each shard."""
    counted = np.random.default_rng(3).random(ids.shape) < share
    for row in range(len(ids)):
        for shard in np.split(np.arange(LENGTH), shards):
            for document in np.unique(ids[row, shard]):
                own = shard[ids[row, shard] == document]
                counted[row, own] = np.arange(len(own)) < np.sum(counted[row, own])
    return counted & (ids != 0)


def one_by_one(arrays, ids, counted):
    """Outputs of counted tokens, zeros for others, and windows, a token at a time."""
    outputs, windows = [], []
    for row in range(len(ids)):
        window, line = list(arrays["window"][row]), []
        for t in range(LENGTH):
            if t > 0 and ids[row, t] not in (0, ids[row, t - 1]):
                window = [jnp.zeros(CHANNELS)] * (WIDTH - 1)
            y = jnp.zeros(CHANNELS)
            if counted[row, t]:
                taps = [*window, arrays["x"][row, t]]
                y = sum(tap * x for tap, x in zip(arrays["weight"], taps, strict=True))
                window = taps[1:]
            line.append(y)
        outputs.append(jnp.stack(line))
        windows.append(jnp.stack(window))
    return jnp.stack(outputs), jnp.stack(windows)


def arrays():
    rng = np.random.default_rng(0)
    shapes = {
        "x": (len(ROWS), LENGTH, CHANNELS),
        "weight": (WIDTH, CHANNELS),
        "window": (len(ROWS), WIDTH - 1, CHANNELS),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("packed", "shards", "share"),
    one_of_many(
        [(p, n, s) for p in (True, False) for n in (1, 2, 3, 8) for s in (0.0, 0.3, 1.0)],
        [(True, 8, 0.3), (False, 3, 0.3), (True, 1, 0.3)],
    ),
)
def test_windows_have_the_counted_tokens(packed, shards, share):
    ids = documents() if packed else np.ones((len(ROWS), LENGTH), np.int32)
    counted = in_front(ids, shards, share)

    def op(arrays, ids, counted):
        y, window = ops.causal_conv1d(
            arrays["x"],
            arrays["weight"],
            initial_state=arrays["window"],
            segments=Segments.from_ids(ids) if packed else None,
            counted=counted,
        )
        return jnp.where(counted[..., None], y, 0.0), window

    def run(op, arrays, ids, counted):
        result, pullback = jax.vjp(lambda arrays: op(arrays, ids, counted), arrays)
        return result, pullback(jax.tree.map(jnp.cos, result))

    expected = run(one_by_one, arrays(), ids, counted)
    function, arguments = functools.partial(run, op), (arrays(), ids, counted)
    if shards > 1:
        mesh = make_mesh(1, seq=shards, devices=jax.devices()[:shards])
        function = on_mesh(function, mesh)
        arguments = jax.device_put(arguments, on(mesh))
    testing.assert_close(jax.jit(function)(*arguments), expected, tolerances.FLOAT32)


def on(mesh):
    """Shardings of arrays, ids and counted."""
    tokens = token_sharding(mesh)
    places = {"x": tokens, "weight": replicated(mesh), "window": batch_sharding(mesh)}
    return places, tokens, tokens
