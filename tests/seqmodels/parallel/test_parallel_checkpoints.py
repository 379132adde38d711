"""Checkpoint attention of split rows against dense attention of whole rows, shard by shard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels.common import segments as segment_ops
from seqmodels.parallel.checkpoints import earlier_checkpoints
from tests.seqmodels.parallel import split_rows as rows
from tests.tiers import one_of_many

HEADS, GROUPS, SIZE = 4, 2, 5


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def dense(args, _, *, runs, positions, interval):
    """The definition: all scores of a row at once."""
    q, (k, v) = args["q"], (jnp.repeat(args[name], HEADS // GROUPS, axis=2) for name in "kv")
    place = np.arange(q.shape[1])
    kept = ((positions + 1) % interval == 0)[:, None] & (place[:, None] > place[None])
    seen = (kept | np.eye(q.shape[1], dtype=bool)) & (runs[:, :, None] == runs[:, None])
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(SIZE)
    scores = jnp.where(seen[:, None], scores, -np.inf)
    o = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v)
    return jnp.where((runs != 0)[..., None, None], o, 0.0)


def tensors(seed):
    rng = np.random.default_rng(seed)
    shapes = {"q": HEADS, "k": GROUPS, "v": GROUPS, "cotangent": HEADS}
    arrays = {
        name: rng.normal(size=(4, rows.LENGTH, count, SIZE)).astype(np.float32)
        for name, count in shapes.items()
    }
    return arrays, arrays.pop("cotangent")


def split(args, data, *, interval):
    past = tuple(args[name] for name in ("past_k", "past_v") if name in args)
    earlier = earlier_checkpoints(
        args["k"],
        args["v"],
        interval=interval,
        segments=data.get("segments"),
        positions=data.get("positions"),
        past=(*past, data["past_length"]) if past else None,
    )
    return kernels.checkpoint_attention(
        *(args[name] for name in "qkv"),
        interval=interval,
        segment_ids=data.get("segments"),
        implementation="xla",
        **earlier._asdict(),
    )


@pytest.mark.parametrize(
    ("shards", "interval"),
    one_of_many([(p, n) for p in (1, 2, 3, 8) for n in (1, 4, 7)], [(3, 7), (8, 4)]),
)
def test_documents(shards, interval):
    _, runs, positions = rows.documents()
    args, cotangent = tensors(shards)
    data = {"segments": runs, "positions": positions}
    mesh = rows.mesh(shards, 2 if shards in (2, 3) else 1)
    op = rows.sharded(functools.partial(split, interval=interval), mesh)
    program = rows.Program(op, args, data, cotangent)
    oracle = functools.partial(dense, runs=runs, positions=positions, interval=interval)
    wanted = rows.in_float64(oracle, args, {}, cotangent)
    rows.assert_shards_close(program(args, data, cotangent), wanted, shards)
    # Keys, values and their documents; back their gradients.
    assert program.asked == {"all_gather": 3, "reduce_scatter": 2}
    assert shards == 1 or program.issued == program.asked

    other = (runs == 3)[..., None, None]
    changed = {name: np.where(other, 7 - 3 * x, x) for name, x in args.items()}
    results = [program(x, data, cotangent) for x in (args, changed)]
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(np.where(other, 0, x), np.where(other, 0, y))


@pytest.mark.full
def test_rows_of_one_document():
    args, cotangent = tensors(0)
    op = rows.sharded(functools.partial(split, interval=4), rows.mesh(8))
    actual = rows.Program(op, args, {}, cotangent)(args, {}, cotangent)
    place = np.broadcast_to(np.arange(rows.LENGTH), (4, rows.LENGTH))
    oracle = functools.partial(dense, runs=np.ones_like(place), positions=place, interval=4)
    rows.assert_shards_close(actual, rows.in_float64(oracle, args, {}, cotangent), 8)


def test_rows_that_continue_documents():
    """The last 36 tokens over 3 shards; of the first 12 the checkpoints are given."""
    interval, before = 3, 12
    ids, runs, positions = rows.documents()
    whole, cotangent = tensors(5)
    cotangent[:, :before] = 0
    oracle = functools.partial(dense, runs=runs, positions=positions, interval=interval)
    wanted = rows.in_float64(oracle, whole, {}, cotangent)

    # Of the document that goes on; behind them are numbers that nothing may read.
    marked = ((positions + 1) % interval == 0) & (runs == runs[:, before : before + 1])
    marked = marked[:, :before]
    held = np.full((2, 4, 5, GROUPS, SIZE), 1e3, np.float32)
    for row in range(4):
        for part, name in zip(held, "kv", strict=True):
            part[row, : marked[row].sum()] = whole[name][row, :before][marked[row]]
    args = {name: x[:, before:] for name, x in whole.items()}
    args |= {"past_k": held[0], "past_v": held[1]}
    data = {
        "segments": np.asarray(segment_ops.index(jnp.asarray(ids[:, before:]))),
        "positions": positions[:, before:],
        "past_length": marked.sum(axis=1).astype(np.int32),
    }
    kept = {"past_k": rows.ROWS, "past_v": rows.ROWS}
    op = rows.sharded(
        functools.partial(split, interval=interval),
        rows.mesh(3),
        dict.fromkeys("qkv", rows.TOKENS) | kept,
        {"segments": rows.TOKENS, "positions": rows.TOKENS, "past_length": rows.ROWS},
    )
    actual = rows.Program(op, args, data, cotangent[:, before:])(args, data, cotangent[:, before:])
    gradients = {name: actual["gradients"].pop(f"past_{name}") for name in "kv"}
    late = jax.tree.map(lambda x: x[:, before:], wanted)
    rows.assert_shards_close(actual, late, 3)
    for name, gradient in gradients.items():
        theirs = np.zeros_like(gradient)
        for row in range(4):
            found = wanted["gradients"][name][row, :before][marked[row]]
            theirs[row, : len(found)] = found
        rows.assert_shards_close(gradient, theirs, 1)
    assert marked.any(axis=1).sum() >= 2


def test_what_is_refused_is_named():
    def refused(message, **options):
        def op(x, _):
            return earlier_checkpoints(x, x, **{"interval": 2, **options})

        x = jax.ShapeDtypeStruct((1, 8, 2, 3), jnp.float32)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(rows.sharded(op, rows.mesh(2), outputs=None), x, {})

    refused("interval must be at least 1, got 0", interval=0)
    refused("segments need positions", segments=jnp.ones((1, 4), jnp.int32))
    refused("axis='rows' is no mesh axis", axis="rows")
