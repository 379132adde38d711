"""Softmax attention against a loop over queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.layers.attention import attend
from seqmodels.mixers import Segments


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def by_queries(q, k, v, *, causal=True, window=None, sinks=0, q_segments=None, k_segments=None,
               k_positions=None):  # fmt: skip
    """The definition, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, size = q.shape
    past, group = k.shape[1] - length, heads // k.shape[2]
    o = np.zeros_like(q)
    for b, t, h in np.ndindex(batch, length, heads):
        seen = []
        for s in range(k.shape[1]):
            if q_segments is not None and q_segments[b, t] != k_segments[b, s]:
                continue
            if causal and s > past + t:
                continue
            late = window is None or past + t - s < window
            if late or (sinks and k_positions[b, s] < sinks):
                seen.append(s)
        scores = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(size)
        p = np.exp(scores - scores.max())
        o[b, t, h] = p / p.sum() @ v[b, seen, h // group]
    return o


def tensors(length, past=0, heads=4, groups=2, size=6, batch=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(length, heads), (past + length, groups), (past + length, groups)]
    return [
        jax.random.normal(key, (batch, n, h, size))
        for key, (n, h) in zip(keys, shapes, strict=True)
    ]


def packed(length, past=0):
    """Documents of many lengths, padding at the end of row 0; with a past, part of it unseen."""
    ends = np.random.default_rng(1).random((2, past + length)) < 0.02
    ends[:, :past] = False
    ids = 1 + np.cumsum(ends, axis=1)
    ids[0, -7:] = 0
    segments = Segments.from_ids(jnp.asarray(ids, jnp.int32))
    runs, positions = np.array(segments.runs), np.array(segments.positions)
    if past:
        runs[1, : past // 2] = -1
        positions[1, : past // 2] = -1
        positions[1] -= np.where(runs[1] == 1, past // 2, 0)
    return {"q_segments": runs[:, past:], "k_segments": runs, "k_positions": positions}


def close(actual, expected, real=None):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    if real is not None:
        actual, expected = actual[real], expected[real]
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    assert error < 1e-6


@pytest.mark.parametrize("past", [0, 90])
@pytest.mark.parametrize("length", [1, 210])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (5, 0), (70, 0), (9, 3), (70, 4)])
def test_packed_rows(length, past, window, sinks):
    q, k, v = tensors(length, past)
    masks = packed(length, past)
    options = {"window": window, "sinks": sinks}
    o = jax.jit(lambda *args, **masks: attend(*args, **options, **masks))(q, k, v, **masks)
    close(o, by_queries(q, k, v, **options, **masks), masks["q_segments"] != 0)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 10}])
def test_rows_of_one_document(options):
    q, k, v = tensors(150, 0, heads=2)
    close(jax.jit(lambda *args: attend(*args, **options))(q, k, v), by_queries(q, k, v, **options))
