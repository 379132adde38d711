"""Softmax attention against a loop over queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import aot, testing
from seqmodels import ops
from seqmodels.layers import attention
from seqmodels.layers.attention import attend
from seqmodels.layers.splash import splash
from seqmodels.mixers import Segments
from seqmodels.parallel import batch_sharding, make_mesh, on_mesh
from tests import tolerances
from tests.arrays import ones


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def by_queries(
    q,
    k,
    v,
    *,
    causal=True,
    window=None,
    sinks=0,
    q_segments=None,
    k_segments=None,
    k_positions=None,
):
    """The definition, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, size = q.shape
    past, group = k.shape[1] - length, heads // k.shape[2]
    o, index = np.zeros_like(q), np.arange(k.shape[1])
    segments = [None if x is None else np.asarray(x) for x in (q_segments, k_segments)]
    k_positions = None if k_positions is None else np.asarray(k_positions)
    for b, t in np.ndindex(batch, length):
        seen = np.ones(k.shape[1], bool)
        if causal:
            seen &= index <= past + t
        if window is not None:
            late = past + t - index < window
            seen &= late | (k_positions[b] < sinks) if sinks else late
        if q_segments is not None:
            seen &= segments[0][b, t] == segments[1][b]
        for h in range(heads):
            scores = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(size)
            p = np.exp(scores - scores.max())
            o[b, t, h] = p / p.sum() @ v[b, seen, h // group]
    return o


def tensors(length, past=0, heads=4, groups=2, size=6, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(length, heads), (past + length, groups), (past + length, groups)]
    x = [rng.standard_normal((batch, n, h, size)).astype(np.float32) for n, h in shapes]
    return list(map(jnp.asarray, x))


def packed(length, past=0):
    """Documents of many lengths, padding at the end of row 0; with a past, part of it unseen."""
    ends = np.random.default_rng(1).random((2, past + length)) < 0.02
    ends[:, :past] = False
    ids = 1 + np.cumsum(ends, axis=1)
    ids[0, -7:] = 0
    segments = jax.jit(Segments.from_ids)(ids.astype(np.int32))
    segment_index, positions = np.array(segments.index), np.array(segments.positions)
    if past:
        segment_index[1, : past // 2] = -1
        positions[1, : past // 2] = -1
        positions[1] -= np.where(segment_index[1] == 1, past // 2, 0)
    masks = {
        "q_segments": segment_index[:, past:],
        "k_segments": segment_index,
        "k_positions": positions,
    }
    return {name: jnp.asarray(mask) for name, mask in masks.items()}


def close(actual, expected, real=None):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    if real is not None:
        actual, expected = actual[real], expected[real]
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    assert error < tolerances.FLOAT32_TERMS


@pytest.mark.parametrize("past", [0, 90])
@pytest.mark.parametrize("length", [1, 210])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (5, 0), (70, 0), (9, 3), (70, 4)])
def test_packed_rows(length, past, window, sinks):
    q, k, v = tensors(length, past)
    masks = packed(length, past)
    options = {"window": window, "sinks": sinks}
    o = jax.jit(lambda *args, **masks: attend(*args, **options, **masks))(q, k, v, **masks)
    close(o, by_queries(q, k, v, **options, **masks), np.asarray(masks["q_segments"] != 0))


@pytest.mark.parametrize(("past", "unseen"), [(0, 0), (40, 0), (40, 40), (40, 25)])
@pytest.mark.parametrize("heads", [2, 8])
def test_head_by_head(heads, past, unseen, monkeypatch):
    """Values by a loop, gradients by all pairs; the past is seen, partly seen or an empty cache."""
    length = 2 * attention.BY_HEAD_FROM + 5
    q, k, v = tensors(length, past, heads=heads)
    masks = packed(length, past)
    masks.pop("k_positions")
    seen = np.array(masks["k_segments"])
    seen[:, past - unseen : past] = -1
    masks["k_segments"] = jnp.asarray(seen)

    def differentiate(*args):
        y, pullback = jax.vjp(lambda *args: attend(*args, **masks), *args)
        return y, pullback(jnp.where(masks["q_segments"][:, :, None, None] != 0, jnp.sin(y), 0.0))

    by_head = jax.jit(differentiate)(q, k, v)
    expected = by_queries(q, k, v, **masks)
    close(by_head[0], expected, np.asarray(masks["q_segments"] != 0))
    monkeypatch.setattr(attention, "BY_HEAD_FROM", length + 1)
    all_pairs = jax.jit(lambda *args: differentiate(*args))(q, k, v)
    jax.tree.map(close, by_head[1], all_pairs[1])


def test_head_by_head_without_documents():
    q, k, v = tensors(attention.BY_HEAD_FROM + 9, heads=2)
    for options in ({}, {"causal": False}, {"window": 200}):
        close(
            jax.jit(lambda *args, o=options: attend(*args, **o))(q, k, v),
            by_queries(q, k, v, **options),
        )
    narrow = jax.jit(attend)(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert narrow.dtype == jnp.bfloat16
    testing.assert_close(narrow, by_queries(q, k, v), tolerances.BFLOAT16_MIXER)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 10}])
def test_rows_of_one_document(options):
    q, k, v = tensors(150, heads=2)
    close(jax.jit(lambda *args: attend(*args, **options))(q, k, v), by_queries(q, k, v, **options))


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"window": 9, "sinks": 3}])
def test_documents_are_isolated_and_blocks_change_nothing(options, monkeypatch):
    length = 210
    q, k, v = tensors(length)
    masks = packed(length)
    if "sinks" not in options:
        masks.pop("k_positions")
    other = np.asarray(masks["q_segments"] == 2)[:, :, None, None]

    def differentiate(q, k, v):
        y, vjp = jax.vjp(lambda *args: attend(*args, **options, **masks), q, k, v)
        return y, vjp(jnp.where(masks["q_segments"][:, :, None, None] != 0, jnp.sin(y), 0.0))

    before = jax.jit(differentiate)(q, k, v)
    changed = jax.jit(differentiate)(*(jnp.where(other, 1e3 * x + 1.0, x) for x in (q, k, v)))
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(changed), strict=True):
        same = np.broadcast_to(other, one.shape)
        np.testing.assert_array_equal(one[~same], two[~same])
        assert np.any(one[same] != two[same])
    # One block after the other instead of all together.
    monkeypatch.setattr(attention, "_SCORES", 1)
    jax.tree.map(close, jax.jit(lambda *args: differentiate(*args))(q, k, v), before)


def test_a_window_costs_in_proportion_to_the_length():
    def flops(length, **options):
        arrays = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)] * 3
        compiled = jax.jit(lambda *args: attend(*args, **options)).lower(*arrays).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(2048, window=64) < 2.1 * flops(1024, window=64)
    all_pairs = 2 * 2 * 2 * 8 * 2048**2
    assert flops(2048, window=64) < all_pairs / 5


SPLASH = [
    ({}, 20),
    ({"causal": False}, 0),
    pytest.param({"window": 30}, 20, marks=pytest.mark.full),
    pytest.param({"window": 30, "sinks": 3}, 0, marks=pytest.mark.full),
    ({"window": 9, "sinks": 2}, 40),
    pytest.param({"window": 500, "sinks": 2}, 0, marks=pytest.mark.full),
]


@pytest.mark.always("options0-20")
@pytest.mark.parametrize(("options", "past"), SPLASH)
def test_splash(options, past):
    """The TPU's kernel, interpreted: padded, with a past, documents and grouped heads."""
    length = 140
    q, k, v = tensors(length, past, size=8)
    masks = packed(length, past)
    real = masks["q_segments"][:, :, None, None] != 0
    rule = {"causal": True, "window": None, "sinks": 0, "scale": 8**-0.5} | options

    def by_splash(q, k, v):
        return splash(q, k, v, *masks.values(), **rule, interpret=True)

    def portable(q, k, v):
        return attend(q, k, v, **masks, **options)

    def differentiate(fn):
        y, vjp = jax.vjp(fn, q, k, v)
        return y, vjp(jnp.where(real, jnp.sin(y), 0.0))

    (one, gradients), (two, others) = (
        jax.jit(differentiate, static_argnums=0)(fn) for fn in (by_splash, portable)
    )
    close(one, two, np.asarray(real)[:, :, 0, 0])
    jax.tree.map(close, gradients, others)


def test_sinks_of_a_row_of_one_document_by_splash():
    """All queries lose them, some in the middle of the sinks; no segments are given."""
    q, k, v = tensors(130, size=8)
    positions = jnp.broadcast_to(jnp.arange(130, dtype=jnp.int32), (2, 130))
    rule = {"causal": True, "window": 4, "sinks": 7, "scale": 8**-0.5}
    o = jax.jit(lambda *args: splash(*args, None, None, positions, **rule, interpret=True))(q, k, v)
    close(o, by_queries(q, k, v, window=4, sinks=7, k_positions=positions))


@pytest.mark.always("0")
@pytest.mark.parametrize("sinks", [0, 4])
def test_compiles_for_a_tpu(sinks):
    """Padded length, a past, documents, heads in groups and of half a register's width."""

    def differentiate(q, k, v, *masks):
        def op(q, k, v):
            names = ("q_segments", "k_segments", "k_positions")
            return attend(q, k, v, window=300, sinks=sinks, **dict(zip(names, masks, strict=True)))

        y, vjp = jax.vjp(op, q, k, v)
        return vjp(y)

    Struct = jax.ShapeDtypeStruct
    q, k = (Struct((2, n, h, 64), jnp.bfloat16) for n, h in ((1000, 4), (1300, 2)))
    masks = [Struct((2, n), jnp.int32) for n in (1000, 1300, 1300)]
    compiled = aot.compile_for("v5e", differentiate, q, k, k, *masks)
    assert (compiled.as_text() or "").count("tpu_custom_call") == 3  # forward, dq, dk and dv
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2**20  # no scores


@pytest.mark.parametrize("options", [{}, {"window": 9, "sinks": 2}])
def test_on_a_mesh(options):
    q, k, v = tensors(130, heads=2)
    masks = packed(130)
    mesh = make_mesh(2, devices=jax.devices()[:2])

    def differentiate(q, k, v):
        y, vjp = jax.vjp(lambda *args: ops.attention(*args, **options, **masks), q, k, v)
        return y, vjp(jnp.sin(y))

    on_two = jax.jit(on_mesh(differentiate, mesh), in_shardings=batch_sharding(mesh))(q, k, v)
    jax.tree.map(close, on_two, jax.jit(differentiate)(q, k, v))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 3, 3, 2), (1, 3, 2, 2)), {}, "G a divisor of H"),
        (((1, 3, 2, 2), (1, 2, 2, 2)), {}, "3 causal queries need at least as many keys, got 2"),
        (((1, 3, 2, 2), (1, 3, 2, 2)), {"window": 0}, "window=0 must be positive"),
        (((1, 3, 2, 2), (1, 3, 2, 2)), {"window": 2, "causal": False}, "causal=True"),
        (((1, 3, 2, 2), (1, 3, 2, 2)), {"sinks": 2}, "sinks=2 needs a window"),
        (
            ((1, 3, 2, 2), (1, 3, 2, 2)),
            {"q_segments": jnp.asarray(ones((1, 3), "int32"))},
            "go together",
        ),
    ],
)
def test_bad_arguments_are_refused(shapes, options, message):
    q, k = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        attend(q, k, k, **options)
