"""Attention of split rows against dense attention of whole rows, shard by shard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.tools import testing
from seqmodels.layers.attention import attend
from seqmodels.parallel import softmax_blocks, validate
from seqmodels.parallel.gather import gather
from seqmodels.parallel.ring import ring
from seqmodels.parallel.ulysses import ulysses
from seqmodels.parallel.window import windowed
from tests.seqmodels.parallel import split_rows as rows
from tests.tiers import one_of_many

STRATEGIES = {"ring": ring, "ulysses": ulysses, "gather": gather, "windowed": windowed}
HEADS, GROUPS, SIZE = 6, 2, 5


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def dense(args, data, *, causal=True, window=None, sinks=0):
    """The definition: all scores of a row at once."""
    q, k, v = (args[name] for name in "qkv")
    repeats = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    place = np.arange(q.shape[1])
    distance = place[:, None] - place[None]
    seen = np.ones((1, *distance.shape), bool)
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        near = distance < window
        seen = seen & (near | (np.asarray(data["positions"]) < sinks)[:, None])
    if "segments" in data:
        ids = np.asarray(data["segments"])
        seen = seen & (ids[:, :, None] == ids[:, None])
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[3])
    scores = jnp.where(seen[:, None], scores, -np.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v)


@functools.cache
def case(packed, heads=HEADS, groups=GROUPS):
    """Arguments, documents and cotangents."""
    _, runs, positions = rows.documents()
    rng = np.random.default_rng(heads + groups)
    shapes = {"q": heads, "k": groups, "v": groups}
    args = {
        name: rng.normal(size=(4, rows.LENGTH, count, SIZE)).astype(np.float32)
        for name, count in shapes.items()
    }
    cotangent = rng.normal(size=args["q"].shape).astype(np.float32)
    if not packed:
        place = np.broadcast_to(np.arange(rows.LENGTH, dtype=np.int32), runs.shape)
        return args, {"positions": place}, cotangent
    # Tokens next to a shard's edge weigh more: errors there do not vanish among the others.
    for x in args.values():
        x[:, 5::6] *= 2
    cotangent[runs == 0] = 0
    return args, {"segments": runs, "positions": positions}, cotangent


@functools.cache
def expected(packed, heads=HEADS, groups=GROUPS, **options):
    args, data, cotangent = case(packed, heads, groups)
    kept = {"segments": data["segments"]} if packed else {}

    def op(args, _):
        return dense(args, {**kept, "positions": data["positions"]}, **options)

    return rows.in_float64(op, args, {}, cotangent)


def on_shards(strategy, options, args, data):
    if not options.get("sinks"):
        data = {name: x for name, x in data.items() if name != "positions"}
    if strategy == "ring":
        data.pop("positions", None)
    return STRATEGIES[strategy](**args, **data, **options)


def program(strategy, shards, packed, heads=HEADS, groups=GROUPS, **options):
    return _program(strategy, shards, packed, heads, groups, **options)


@functools.cache
def _program(strategy, shards, packed, heads, groups, **options):
    op = functools.partial(on_shards, strategy, options)
    mesh = rows.mesh(shards, 2 if shards in (2, 3) else 1)
    return rows.Program(rows.sharded(op, mesh), *case(packed, heads, groups))


def only_real(result, data):
    """A result with zeros where the output is unspecified."""
    outputs = np.asarray(result["outputs"])
    if "segments" in data:
        outputs = np.where((data["segments"] != 0)[..., None, None], outputs, 0)
    return {**result, "outputs": outputs}


def check(strategy, shards, packed, heads=HEADS, groups=GROUPS, **options):
    args, data, cotangent = case(packed, heads, groups)
    actual = program(strategy, shards, packed, heads, groups, **options)(args, data, cotangent)
    options.pop("balance", None)
    wanted = expected(packed, heads, groups, **options)
    rows.assert_shards_close(only_real(actual, data), only_real(wanted, data), shards)


SHARDS = [1, 2, 3, 8]
WHOLE = ["ring", "ulysses", "gather"]
"""Strategies that serve attention to all of a document."""


def some(strategies, shards, always):
    return one_of_many([(a, b) for a in strategies for b in shards], always)


@pytest.mark.full("ring-2", "ring-8")
@pytest.mark.parametrize(
    ("strategy", "shards"), some(WHOLE, SHARDS, [(a, b) for a in WHOLE for b in (2, 3, 8)])
)
def test_causal_documents(strategy, shards):
    check(strategy, shards, True)


@pytest.mark.parametrize(
    ("strategy", "shards"), some(WHOLE, SHARDS, [("ring", 3), ("ulysses", 8), ("gather", 8)])
)
def test_both_sides(strategy, shards):
    check(strategy, shards, True, causal=False)


@pytest.mark.parametrize(
    ("strategy", "shards"), some(WHOLE, SHARDS, [("ring", 8), ("ulysses", 3), ("gather", 3)])
)
def test_rows_of_one_document(strategy, shards):
    check(strategy, shards, False)


@pytest.mark.parametrize("shards", one_of_many(SHARDS, [3]))
def test_ring_in_the_order_of_the_row(shards):
    check("ring", shards, True, balance=False)


@pytest.mark.parametrize(
    ("strategy", "shards", "window", "sinks"),
    one_of_many(
        [
            (strategy, shards, *rule)
            for strategy in ("ulysses", "gather", "windowed")
            for shards in SHARDS
            for rule in ((1, 0), (4, 0), (9, 3), (45, 2))
        ],
        [
            ("ulysses", 3, 9, 3),
            ("gather", 8, 9, 3),
            ("windowed", 3, 4, 0),
            ("windowed", 8, 9, 3),
            ("windowed", 8, 45, 2),
        ],
    ),
)
def test_windows(strategy, shards, window, sinks):
    check(strategy, shards, True, window=window, sinks=sinks)


@pytest.mark.full
def test_windows_in_rows_of_one_document():
    check("windowed", 8, False, window=8, sinks=2)


@pytest.mark.parametrize(
    ("heads", "groups", "shards"),
    one_of_many(
        [(h, g, p) for h, g in ((6, 6), (6, 3), (5, 1), (8, 4), (16, 8)) for p in (2, 3, 8)],
        [(6, 3, 8), (5, 1, 3), (8, 4, 2)],
    ),
)
def test_heads_that_the_shards_divide_and_do_not(heads, groups, shards):
    check("ulysses", shards, True, heads, groups)


@pytest.mark.full
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (6, 6)])
@pytest.mark.parametrize("strategy", ["ring", "gather", "windowed"])
def test_other_heads(strategy, heads, groups):
    options = {"window": 9} if strategy == "windowed" else {}
    check(strategy, 3, True, heads, groups, **options)


COUNTS = {
    # To zigzag and back 6, and 4 for the gradients; for each of the two ways round: keys with
    # values, and documents, before the loop and in it, forward and backward, and their gradients in
    # the loop, behind it and home.
    ("ring", 3): {"collective_permute": 10 + 2 * (2 * 4 + 3)},
    ("ring", 8): {"collective_permute": 10 + 2 * (2 * 4 + 3)},
    # One way round, and no loop.
    ("ring", 2): {"collective_permute": 10 + 2 * 2 + 2},
    ("ulysses", 3): {"all_to_all": 4, "all_gather": 1},
    ("ulysses", 8): {"all_to_all": 4, "all_gather": 1},
    ("gather", 3): {"all_gather": 3, "reduce_scatter": 1},
    ("gather", 8): {"all_gather": 3, "reduce_scatter": 1},
}


@pytest.mark.parametrize(("strategy", "shards"), COUNTS)
def test_collectives(strategy, shards):
    found = program(strategy, shards, True)
    assert found.asked == COUNTS[strategy, shards]
    # A CPU's compiler sees that the backward pass asks for what the forward pass has had.
    again = {("ring", 2): 2, ("ring", 3): 8, ("ring", 8): 4, ("gather", 3): 1, ("gather", 8): 1}
    saved = found.asked - found.issued
    assert saved.total() == again.get((strategy, shards), 0)
    assert not found.issued - found.asked


def test_collectives_of_windows():
    # Keys and values, and their documents, from one and from two shards; back the gradients.
    near = program("windowed", 3, True, window=4, sinks=0)
    assert near.asked == near.issued == {"collective_permute": 3}
    far = program("windowed", 8, True, window=9, sinks=3)
    counts = {"collective_permute": 6, "all_gather": 2, "reduce_scatter": 1}
    assert far.asked == far.issued == counts


@pytest.mark.full
def test_memory_of_a_ring_does_not_grow_with_the_shards():
    def temporary(shards):
        shapes = {"q": (1, 64 * shards, 4, 16), "k": (1, 64 * shards, 2, 16)}
        args = {x: jax.ShapeDtypeStruct(shapes[x.replace("v", "k")], jnp.float32) for x in "qkv"}
        op = rows.sharded(functools.partial(on_shards, "ring", {}), rows.mesh(shards))
        return rows.Program(op, args, {}, args["q"]).temporary

    assert temporary(8) <= 1.02 * temporary(3)


@pytest.mark.parametrize(
    ("strategy", "shards", "options"),
    [
        ("ring", 8, {}),
        ("ulysses", 8, {}),
        ("gather", 8, {}),
        ("windowed", 8, {"window": 9, "sinks": 3}),
    ],
)
def test_documents_are_isolated(strategy, shards, options):
    args, data, cotangent = case(True)
    run = program(strategy, shards, True, **options)
    other = (data["segments"] == 3)[..., None, None]
    changed = {name: np.where(other, 7 - 3 * x, x) for name, x in args.items()}
    one, two = run(args, data, cotangent), run(changed, data, cotangent)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert not np.array_equal(x, y)
        np.testing.assert_array_equal(np.where(other, 0, x), np.where(other, 0, y))


@pytest.mark.parametrize(
    ("strategy", "check_vma", "spec"),
    one_of_many(
        [
            (strategy, check_vma, spec)
            for strategy in STRATEGIES
            for check_vma in (False, True)
            for spec in (PartitionSpec("data", "seq"), PartitionSpec(None, "seq"))
        ],
        [
            ("ring", True, PartitionSpec(None, "seq")),
            ("gather", False, PartitionSpec(None, "seq")),
            ("windowed", False, PartitionSpec("data", "seq")),
        ],
    ),
)
def test_mesh_axes_that_specs_leave_out(strategy, check_vma, spec):
    """Arrays that are the same along ``model``, or along ``data`` too."""
    args, data, cotangent = case(True)
    options = {"window": 9, "sinks": 3} if strategy == "windowed" else {}
    op = functools.partial(on_shards, strategy, options)
    mesh = rows.mesh(2, rows=2, model=2)
    op = rows.sharded(op, mesh, spec, spec, outputs=spec, check_vma=check_vma)
    actual = rows.Program(op, args, data, cotangent)(args, data, cotangent)
    wanted = expected(True, **options)
    rows.assert_shards_close(only_real(actual, data), only_real(wanted, data), 2)


@pytest.mark.full
@pytest.mark.parametrize("strategy", one_of_many(WHOLE, ["ring"]))
def test_bfloat16_loses_no_more_than_on_one_device(strategy):
    args, data, cotangent = case(True)
    narrow = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.bfloat16))
    args, cotangent = narrow(args), narrow(cotangent)

    def whole(args, data):
        return attend(**args, q_segments=data["segments"], k_segments=data["segments"])

    split = rows.sharded(functools.partial(on_shards, strategy, {}), rows.mesh(8))
    segments = data["segments"]
    exact = rows.in_float64(lambda args, _: dense(args, data), args, {}, cotangent)
    results = [
        only_real(rows.Program(op, args, data, cotangent)(args, data, cotangent), data)
        for op in (split, whole)
    ]
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(results[0]))
    errors = [
        [testing.rmse_ratio(x, y) for x, y in zip(*map(jax.tree.leaves, pair), strict=True)]
        for pair in ((result, only_real(exact, data)) for result in results)
    ]
    assert segments.min() == 0
    assert all(split <= 1.5 * whole for split, whole in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("balance", [True, False])
def test_blocks_of_queries_change_nothing(balance, monkeypatch):
    monkeypatch.setattr(softmax_blocks, "SCORES", 1)
    monkeypatch.setattr(softmax_blocks, "_LEAST_ROWS", 5)
    args, data, cotangent = case(True)
    op = functools.partial(on_shards, "ring", {"balance": balance})
    run = rows.Program(rows.sharded(op, rows.mesh(2)), args, data, cotangent)
    actual = only_real(run(args, data, cotangent), data)
    rows.assert_shards_close(actual, only_real(expected(True), data), 2)


def test_segments_are_those_of_a_shard():
    with pytest.raises(ValueError, match=r"ring: segments must be \(B, l\) = \(1, 4\), as q"):
        validate.same_tokens("ring", "segments", np.ones((1, 8)), "q", np.ones((1, 4, 2, 3)))


def refused(op, *shapes, **options):
    """The message of the error that ``op`` raises for shapes of whole rows over 2 shards."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    split = rows.sharded(lambda args, _: op(*args, **options), rows.mesh(2))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        jax.eval_shape(split, arrays, {})
    return str(error.value)


def test_what_is_refused_is_named():
    q, k = (4, 12, 4, 5), (4, 12, 2, 5)
    odd = refused(ring, (4, 10, 4, 5), (4, 10, 2, 5), (4, 10, 2, 5))
    assert "a shard of 5 tokens (a row of 10 over seq=2)" in odd
    assert "a multiple of 4, such as 12, or use balance=False" in odd
    for name, op in STRATEGIES.items():
        options = {"window": 3} if name == "windowed" else {}
        assert "G a divisor of H" in refused(op, q, (4, 12, 3, 5), (4, 12, 3, 5), **options)
        assert "axis='rows' is no mesh axis" in refused(op, q, k, k, axis="rows", **options)
    for op in (ulysses, gather):
        assert "window=0 must be positive" in refused(op, q, k, k, window=0)
        assert "window=3 must be positive, with causal=True" in refused(
            op, q, k, k, window=3, causal=False
        )
        assert "sinks=2 needs a window and positions" in refused(op, q, k, k, window=3, sinks=2)
