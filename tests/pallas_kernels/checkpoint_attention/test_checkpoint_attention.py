"""The op as its users know it: the portable path and the reference, under jit."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import checkpoint_attention
from pallas_kernels.checkpoint_attention import Cache, merge, slots, tile, xla
from pallas_kernels.checkpoint_attention.slots import Config
from pallas_kernels.tools import testing
from tests import tolerances
from tests.arrays import ones, zeros
from tests.pallas_kernels.checkpoint_attention.cases import Case, assert_isolated
from tests.tiers import compiled_as_users, one_of_many


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def same_bits(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


# Each length and feature, not the full product: compilation is slow.
FULL = pytest.mark.full
PLAIN = [
    {"length": 1, "packed": True},
    {"length": 1, "past": 5, "past_length": [2, 0]},
    pytest.param({"length": 1, "past": 5, "past_length": [2, 0], "own": False}, marks=FULL),
    {"length": 2, "interval": 1},
    {"length": 15, "packed": True, "groups": 2, "heads": 4},
    pytest.param({"length": 63, "interval": 16}, marks=FULL),
    {"length": 63, "past": 3, "packed": True, "heads": 3},
    pytest.param({"length": 65, "packed": True, "interval": 1}, marks=FULL),
    {"length": 65, "past": 5, "past_length": [0, 5], "groups": 2, "heads": 6},
    pytest.param({"length": 65, "past": 5, "past_length": [0, 5], "own": False}, marks=FULL),
    {"length": 65, "past": 5, "own": False, "packed": True},
    pytest.param({"length": 5, "past": 2, "interval": 100}, marks=FULL),
    {"length": 1000, "interval": 3, "packed": True, "past": 7, "past_length": [3, 0]},
    pytest.param({"length": 1000, "interval": 10, "groups": 2, "batch": 1}, marks=FULL),
]


@pytest.mark.full("1000-3-True-7-[3, 0]", "65-5-False-True", "63-3-True-3")
@pytest.mark.parametrize(
    "features",
    compiled_as_users(PLAIN, lambda f: f["length"] >= 65),
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_xla_equals_the_oracle(features):
    case = Case(**features)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_xla_keeps_double_precision():
    with jax.enable_x64(True):
        case = Case(length=300, dtype="float64", packed=True, past=3)
        result = case.run("xla")
        assert {x.dtype for x in jax.tree.leaves(result)} == {np.dtype("float64")}
        testing.assert_close(result, case.run("reference"), testing.FLOAT64_TOLERANCE)


def test_the_oracle_is_masked_softmax_attention():
    case = Case(length=14, interval=3, heads=1)
    q, k, v = (np.asarray(x, np.float64)[:, :, 0] for x in case.args.values())
    t, s = np.indices((14, 14))
    mask = (s == t) | ((s % 3 == 2) & (s < t))
    scores = np.where(mask, np.einsum("btk,bsk->bts", q, k) * 5**-0.5, -np.inf)
    p = np.exp(scores)
    o, lse = case.run("reference")["outputs"]
    np.testing.assert_allclose(
        o[:, :, 0], p @ v / p.sum(2, keepdims=True), **tolerances.EACH_FLOAT32_TERMS_OF_ONE
    )
    np.testing.assert_allclose(
        lse[:, :, 0], np.log(p.sum(2)), **tolerances.EACH_FLOAT32_TERMS_OF_ONE
    )


def test_every_token_a_checkpoint_is_causal_attention():
    case = Case(length=80, interval=1, groups=2, heads=4, key_size=8, value_size=8)
    expected = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))
    o, _ = case.run("xla")["outputs"]
    testing.assert_close(o, expected(*case.args.values()), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_bfloat16_against_the_float32_oracle():
    case = Case(length=300, dtype="bfloat16", packed=True, key_size=32, value_size=16, heads=4)
    actual, expected = case.run("xla"), case.oracle()
    assert [x.dtype.name for x in actual["outputs"]] == ["bfloat16", "float32"]
    testing.assert_close(actual["outputs"], expected["outputs"], tolerances.BFLOAT16)
    testing.assert_close(actual["gradients"], expected["gradients"], tolerances.BFLOAT16_GRADIENTS)


@pytest.mark.always("xla")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_packed_equals_one_document_a_row(implementation):
    case = Case(length=150, packed=True, batch=1, past=3)
    ids = np.asarray(case.options.pop("segment_ids")[0])
    options, q = case.options, case.args["q"]
    run = jax.jit(
        functools.partial(checkpoint_attention, interval=4, implementation=implementation)
    )
    past = {name: case.args[name] for name in ("past_k", "past_v")} | {"offset": options["offset"]}
    o = run(*list(case.args.values())[:3], **past, segment_ids=jnp.asarray(ids[None]))
    real = int((ids != 0).sum())
    borders = [0, *(np.flatnonzero(np.diff(ids[:real])) + 1), real]
    run = jax.jit(functools.partial(checkpoint_attention, interval=4, implementation="reference"))
    for start, stop in itertools.pairwise(borders):
        part = [case.args[name][:, start:stop] for name in ("q", "k", "v")]
        alone = run(*part, **(past if start == 0 else {}))
        testing.assert_close(o[:, start:stop], alone, testing.FLOAT32_TOLERANCE)
    assert q.shape[1] > real
    np.testing.assert_array_equal(o[:, real:], 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("past", [0, 3])
def test_documents_are_isolated_to_the_bit(implementation, past):
    assert_isolated(lambda case: case.run(implementation), Case(length=100, past=past))


def test_a_row_of_padding_is_zero():
    case = Case(length=20, past=3)
    result = case.replaced(segment_ids=jnp.zeros((2, 20), jnp.int32)).run("xla")
    for x in jax.tree.leaves(result):
        np.testing.assert_array_equal(x, 0)


def test_padding_and_tokens_without_keys_have_an_lse_of_minus_infinity():
    case = Case(length=6, own=False, past=2, past_length=[0, 1])
    run = functools.partial(checkpoint_attention, **case.options, return_lse=True)
    _, lse = jax.jit(run)(**case.args)
    assert np.isneginf(lse[0]).all()
    assert np.isfinite(lse[1]).all()
    ids = jnp.asarray([[1, 1, 1, 0, 0, 0], [2, 2, 2, 2, 2, 2]], jnp.int32)
    args = Case(length=6).args
    run = functools.partial(checkpoint_attention, interval=4, return_lse=True)
    _, lse = jax.jit(run)(**args, segment_ids=ids)
    np.testing.assert_array_equal(np.isneginf(lse[:, :, 0]), ids == 0)


@pytest.mark.parametrize("interval", one_of_many([1, 4], [4]))
@pytest.mark.parametrize("cuts", [[0, 7, 40, 70], list(range(71))], ids=["split", "steps"])
def test_whole_equals_split_equals_step_by_step(interval, cuts):
    args = Case(length=70, interval=interval, groups=2, heads=4).args
    whole = jax.jit(functools.partial(checkpoint_attention, interval=interval))(**args)
    cache, parts = Cache.empty(2, 70, 2, 5, 3, interval=interval, dtype=jnp.float32), []

    @jax.jit
    def advance(cache, q, k, v):
        o = checkpoint_attention(q, k, v, interval=interval, **cache.past(interval))
        return o, cache.extend(k, v, interval=interval)

    for start, stop in itertools.pairwise(cuts):
        o, cache = advance(cache, *(x[:, start:stop] for x in args.values()))
        parts.append(o)
    testing.assert_close(jnp.concatenate(parts, 1), whole, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(cache.position, 70)


@pytest.mark.full
def test_rows_at_different_places_decode_together():
    """Row 0 holds 9 tokens, row 1 holds 3 of its second document; one more token each."""
    args = Case(length=10, interval=3, heads=1).args
    ids = jnp.asarray([[1] * 9, [5] * 6 + [7] * 3], jnp.int32)
    cache = Cache.empty(2, 12, 1, 5, 3, interval=3, dtype=jnp.float32)
    cache = jax.jit(functools.partial(Cache.extend, interval=3))(
        cache, args["k"][:, :9], args["v"][:, :9], segment_ids=ids
    )
    np.testing.assert_array_equal(cache.position, [9, 3])
    last = [x[:, 9:] for x in args.values()]
    o = jax.jit(functools.partial(checkpoint_attention, interval=3))(*last, **cache.past(3))
    ids = jnp.asarray([[1] * 10, [5] * 6 + [7] * 4], jnp.int32)
    whole = checkpoint_attention(**args, interval=3, segment_ids=ids)
    testing.assert_close(o, whole[:, 9:], testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_padding_leaves_the_cache_as_it_is():
    args = Case(length=8, interval=2).args
    cache = Cache.empty(2, 8, 1, 5, 3, interval=2, dtype=jnp.float32)
    cache = cache.extend(args["k"][:, :3], args["v"][:, :3], interval=2)
    none = jnp.zeros((2, 8), jnp.int32)
    same_bits(cache.extend(args["k"], args["v"], interval=2, segment_ids=none), cache)


@pytest.mark.full
def test_gradients_flow_through_the_cache():
    args = Case(length=24, interval=3).args

    def loss(args, *, cuts):
        cache, total = Cache.empty(2, 24, 1, 5, 3, interval=3, dtype=jnp.float32), 0.0
        for start, stop in itertools.pairwise(cuts):
            q, k, v = (args[name][:, start:stop] for name in "qkv")
            o = checkpoint_attention(q, k, v, interval=3, **cache.past(3))
            cache, total = cache.extend(k, v, interval=3), total + jnp.sum(jnp.sin(o))
        return total

    parts, whole = (jax.jit(jax.grad(functools.partial(loss, cuts=c)))(args) for c in CUTS)
    testing.assert_close(parts, whole, testing.FLOAT32_TOLERANCE)


CUTS = [0, 10, 17, 24], [0, 24]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_is_written_in_place(dtype):
    cache = Cache.empty(2, 2**14, 1, 8, 8, interval=4, dtype=dtype)
    token = jnp.ones((2, 1, 1, 8), dtype)
    step = jax.jit(functools.partial(Cache.extend, interval=4), donate_argnums=0)
    memory = step.lower(cache, token, token).compile().memory_analysis()
    assert cache.k.shape[1] == 2**14 // 4
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    assert memory.temp_size_in_bytes < cache.k.nbytes // 8


def test_bfloat16_tokens_one_by_one_are_the_row():
    """One is a checkpoint, two are not; the sixth checkpoint finds no room, and nothing is read."""
    args = Case(length=20, interval=3, dtype="bfloat16").args
    empty = Cache.empty(2, 17, 1, 5, 3, interval=3, dtype=jnp.bfloat16)
    extend = jax.jit(functools.partial(Cache.extend, interval=3))
    cache = empty
    for t in range(20):
        cache = extend(cache, args["k"][:, t : t + 1], args["v"][:, t : t + 1])
    assert cache.k.shape[1] == 5
    same_bits(cache, extend(empty, args["k"], args["v"]))


@pytest.mark.always("xla")
@pytest.mark.parametrize("kind", ["xla", "reference"])
def test_merged_parts_are_the_whole(kind):
    """Own keys with the second shard's checkpoints; those of the first in two windows."""
    case = Case(length=40, past=6, groups=2, heads=4)
    offset = case.options["offset"]

    def op(args, *, parted):
        run = functools.partial(
            checkpoint_attention, interval=4, implementation=kind, return_lse=True
        )
        if not parted:
            return run(**args, offset=offset)
        own = run(args["q"], args["k"], args["v"], offset=offset)
        windows = [
            run(args["q"], None, None, past_k=args["past_k"][:, w], past_v=args["past_v"][:, w])
            for w in (slice(2), slice(2, None))
        ]
        return merge([windows[0], own, windows[1]])

    results = [
        testing.value_and_gradients(
            functools.partial(op, parted=parted), case.args, cotangents=case.cotangents
        )
        for parted in (False, True)
    ]
    testing.assert_close(*results, testing.FLOAT32_TOLERANCE)


def test_merging_nothing_is_nothing_and_its_gradient_is_finite():
    nothing = jnp.zeros((1, 2, 1, 3)), jnp.full((1, 2, 1), -jnp.inf)
    something = jnp.ones((1, 2, 1, 3)), jnp.asarray([[[0.5], [-jnp.inf]]])

    def total(a, b):
        o, lse = merge([a, b])
        return o.sum() + jnp.where(jnp.isneginf(lse), 0.0, lse).sum()

    o, lse = merge([nothing, something])
    np.testing.assert_allclose(o[0, :, 0, 0], [1, 0])
    np.testing.assert_allclose(lse[0, :, 0], [0.5, -np.inf])
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(nothing, something)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_bad_parts_are_named():
    o, lse = jnp.ones((1, 2, 1, 3)), jnp.ones((1, 2, 1))
    for parts, message in [
        ([], "must not be empty"),
        ([(o, lse), (o[:, :1], lse)], r"must be pairs of o \(B, L, H, V\)"),
        ([(o, lse), (o.astype(jnp.bfloat16), lse)], "must have the same dtypes"),
    ]:
        with pytest.raises(ValueError, match=message):
            merge(parts)


@pytest.mark.always("-1.0")
@pytest.mark.parametrize("scale", [100.0, 1e-6, -1.0])
def test_extreme_scores(scale):
    """Softmax that is one key, all keys alike, or of negative scale."""
    case = Case(length=130).replaced(scale=scale)
    testing.assert_close(
        case.run("xla"),
        case.oracle(),
        tolerances.FLOAT32_LARGE_SCORES if scale == 100.0 else tolerances.FLOAT32,
    )


def test_grouped_heads_equal_repeated_keys_and_values():
    case = Case(length=40, groups=2, heads=6)
    repeated = {name: jnp.repeat(case.args[name], 3, axis=2) for name in ("k", "v")}
    grouped, full = case.run("xla"), case.replaced(**repeated).run("xla")
    for name in ("k", "v"):
        gradient = full["gradients"][name]
        full["gradients"][name] = gradient.reshape(2, 40, 2, 3, -1).sum(3)
    testing.assert_close(grouped, full, testing.FLOAT32_TOLERANCE)


def test_the_same_call_twice_is_bitwise_equal():
    case = Case(length=129, packed=True)
    same_bits(case.run("xla"), case.run("xla"))


@pytest.mark.full
@pytest.mark.parametrize("packed", one_of_many([False, True], [True]))
def test_vmap_equals_folding_into_the_batch(packed):
    case = Case(length=30, batch=6, packed=packed, past=2)

    def loss(args, options):
        o, lse = checkpoint_attention(**args, **options, interval=4, return_lse=True)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) ** 2)

    args = case.args, {n: x for n, x in case.options.items() if n != "interval"}
    folded = jax.jit(jax.grad(loss))(*args)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(
        *jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), args)
    )
    mapped = jax.tree.map(lambda x, y: x.reshape(y.shape), mapped, folded)
    testing.assert_close(mapped, folded, testing.FLOAT32_TOLERANCE)


def test_second_order_and_forward_mode_through_the_reference():
    args = dict(Case(length=5, interval=2, batch=1, heads=1).args)
    q = args.pop("q")

    def loss(q):
        o = checkpoint_attention(q, **args, interval=2, implementation="reference")
        return jnp.sum(o**2)

    _, tangent = jax.jit(lambda q: jax.jvp(loss, (q,), (jnp.ones_like(q),)))(q)
    np.testing.assert_allclose(
        tangent, jax.jit(jax.grad(loss))(q).sum(), **tolerances.EACH_FLOAT32_TOTAL
    )
    assert np.isfinite(jax.jit(jax.hessian(loss))(q)).all()


def test_no_array_of_all_scores_and_nothing_kept_but_inputs_and_outputs():
    case = Case(length=4096, batch=1, heads=1, key_size=8, value_size=8)
    forward = functools.partial(checkpoint_attention, interval=4, implementation="xla")
    _, pullback = jax.eval_shape(lambda *x: jax.vjp(forward, *x), *case.args.values())
    kept = sum(x.size for x in jax.tree.leaves(pullback))
    inputs = sum(x.size for x in case.args.values())
    assert kept <= inputs * (1 + 1 / 4 + 1 / 3) + 4 * 4096

    def gradients(q, k, v, do):
        return jax.vjp(forward, q, k, v)[1](do)

    compiled = jax.jit(gradients).lower(*case.args.values(), case.cotangents[0]).compile()
    all_scores = 4 * 4096 * 4096 // 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_scores // 4


@pytest.mark.full
@hypothesis.settings(max_examples=8)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    padding=st.integers(0, 20),
    interval=st.sampled_from([1, 5, 16]),
    offset=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_any_segmentation(lengths, padding, interval, offset, seed):
    total = 96  # one length, so that little is compiled
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[: total - padding]
    ids = np.pad(ids, (0, total - padding - len(ids)), constant_values=7)
    ids = np.pad(ids, (0, padding))
    case = Case(length=total, batch=1, interval=interval, past=8, seed=seed)
    case = case.replaced(
        segment_ids=jnp.asarray(ids[None], jnp.int32),
        offset=jnp.asarray([offset], jnp.int32),
        past_length=jnp.asarray([min(8, offset // interval)], jnp.int32),
    )
    testing.assert_close(case.run("xla"), case.run("reference"), tolerances.FLOAT32_BOTH)


@pytest.mark.full
def test_training_in_bfloat16_stays_finite_and_learns():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 64, 16)), jnp.bfloat16)
    target = jnp.cumsum(x.astype(jnp.float32)[:, 3::4], 1).repeat(4, 1) / 4
    weights = jnp.asarray(rng.standard_normal((3, 16, 16)) / 4, jnp.float32)

    def loss(weights):
        q, k, v = (jnp.dot(x, w.astype(x.dtype)).reshape(4, 64, 2, 8) for w in weights)
        o = checkpoint_attention(q, k, v, interval=4)
        return jnp.mean((o.reshape(target.shape).astype(jnp.float32) - target) ** 2)

    @jax.jit
    def step(weights, _):
        value, gradient = jax.value_and_grad(loss)(weights)
        return weights - 0.3 * gradient, value

    _, losses = jax.lax.scan(step, weights, length=150)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]


# The maths of blocks, and where checkpoints are.


def test_blocks_in_any_order_make_the_softmax():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((4, 30)).astype(np.float32) * 5
    mask = rng.random((4, 30)) < 0.5
    mask[2] = False
    maximum, total = jnp.full((4, 1), tile.LOW), jnp.zeros((4, 1))
    summed = jnp.zeros((4, 1))
    for part in (slice(20, 30), slice(0, 7), slice(7, 20)):
        maximum, total, factor, p = tile.block(
            maximum, total, jnp.asarray(scores[:, part]), jnp.asarray(mask[:, part]), 1
        )
        summed = factor * summed + p.sum(1, keepdims=True)
    expected = np.where(mask, np.exp(scores), 0).sum(1, keepdims=True)
    lse = tile.or_infinity(tile.log_sum_exp(maximum, total))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(expected), **tolerances.EACH_FLOAT32_TERMS)
    np.testing.assert_allclose(
        summed * tile.inverse(total), expected > 0, **tolerances.EACH_FLOAT32_TERMS
    )


def test_slots_of_packed_rows_in_numpy():
    rng = np.random.default_rng(1)
    ids, interval, offset, held = testing.random_ids(rng, 3, 60), 3, [5, 0, 7], [1, 0, 2]
    k = rng.standard_normal((3, 60, 1, 2)).astype(np.float32)
    past = rng.standard_normal((3, 2, 1, 2)).astype(np.float32)
    segment_index = jax.jit(pallas_kernels.common.segments.index)(ids)
    run = jax.jit(functools.partial(slots.slots, Config(1.0, interval)))
    got = run(k, k, k, past, past, np.int32(held), np.int32(offset), segment_index)
    for b in range(3):
        position, run, before = offset[b] - 1, 1, [past[b, i] for i in range(held[b])]
        for t in range(60):
            if t and ids[b, t] != ids[b, t - 1]:
                position, run, before = -1, run + 1, []
            position += 1
            first, last = int(got.first[b, t]), int(got.last[b, t])
            if ids[b, t] == 0:
                assert last == -1
                continue
            seen = [got.k[b, i] for i in range(first, last)]
            assert len(seen) == len(before)
            for x, y in zip(seen, before, strict=True):
                np.testing.assert_array_equal(x, y)
            if (position + 1) % interval == 0:
                before = [*before, k[b, t]]


def test_blocks_that_no_token_sees_are_left_out():
    plan = xla._Plan(1, 64, 1, 1, 8, 4, 1)
    ranges = [jnp.asarray(x, jnp.int32)[:, None] for x in ([0, 5, 9, 0], [0, 11, 13, -1])]
    begin, end = xla._reach(plan, xla._Tokens(None, None, None, *ranges))
    assert (int(begin), int(end)) == (1, 4)
    begin, end = xla._reach(plan, xla._Tokens(None, None, None, ranges[0], 0 * ranges[1] - 1))
    assert int(begin) >= int(end)


GOOD = {
    "q": ones((2, 5, 4, 3)),
    "k": ones((2, 5, 2, 3)),
    "v": ones((2, 5, 2, 6)),
    "interval": 2,
}
PAST = {
    "past_k": ones((2, 7, 2, 3)),
    "past_v": ones((2, 7, 2, 6)),
    "offset": np.asarray([14, 15], jnp.int32),
}
BAD = [
    ("q rank", {"q": ones((2, 5, 4))}, r"q must be \(B, L, H, K\), got shape \(2, 5, 4\)"),
    ("k length", {"k": ones((2, 4, 2, 3))}, r"k must be \(B, L, G, K\)"),
    ("k width", {"k": ones((2, 5, 2, 4))}, r"k must be .* got shape \(2, 5, 2, 4\)"),
    ("v groups", {"v": ones((2, 5, 1, 6))}, r"v must be \(B, L, G, V\)"),
    ("groups", {"q": ones((2, 5, 3, 3))}, "G must divide H, got k with G = 2 and q with H = 3"),
    ("wide", {"v": ones((2, 5, 2, 257))}, "up to 256, got K = 3 and V = 257"),
    ("empty", {"v": ones((2, 5, 2, 0))}, "v must not be empty"),
    ("dtype", {"q": ones((2, 5, 4, 3), jnp.int32)}, "q must be float32 .* got int32"),
    ("mixed", {"k": ones((2, 5, 2, 3), jnp.bfloat16)}, "k must be float32 since q is float32"),
    ("interval", {"interval": 0}, "interval must be an integer, at least 1, got 0"),
    ("interval kind", {"interval": 2.0}, "interval must be an integer, at least 1, got 2.0"),
    ("k alone", {"v": None}, "k needs v, got v=None"),
    ("v alone", {"k": None}, "v needs k, got k=None"),
    ("nothing", {"k": None, "v": None}, "only with past_k and past_v"),
    ("past alone", PAST | {"past_v": None}, "past_k needs past_v, got past_v=None"),
    ("past width", PAST | {"past_k": ones((2, 7, 2, 4))}, r"past_k must be \(B, P, G, K\)"),
    ("past v", PAST | {"past_v": ones((2, 7, 2, 5))}, r"past_v must be .* as v has them"),
    ("past groups", PAST | {"past_k": ones((2, 7, 1, 3)), "past_v": ones((2, 7, 1, 6))},
     r"past_k must be .* as k has them"),
    ("past dtype", PAST | {"past_k": ones((2, 7, 2, 3), jnp.bfloat16)}, "past_k must be float"),
    ("past where", PAST | {"offset": None}, "past_k needs offset"),
    ("offset alone", PAST | {"k": None, "v": None}, "offset has no meaning where k and v are None"),
    ("offset shape", {"offset": zeros(3, jnp.int32)}, r"offset must be \(B,\) = \(2,\)"),
    ("offset dtype", {"offset": zeros(2)}, "offset must be int32, got float32"),
    ("offset value", {"offset": np.asarray([0, -1], jnp.int32)}, r"at least 0, got \[0, -1\]"),
    ("length alone", {"past_length": zeros(2, jnp.int32)}, "past_length needs past_k"),
    ("length value", PAST | {"past_length": np.asarray([7, 8], jnp.int32)}, "at most P = 7"),
    ("ids shape", {"segment_ids": ones((2, 4), jnp.int32)}, r"segment_ids must be \(B, L\)"),
    ("ids value", {"segment_ids": -ones((2, 5), jnp.int32)}, "segment_ids must be >= 0"),
    ("name", {"implementation": "cuda"}, "choose among reference, xla"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_attention(**(GOOD | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": ones((2, 5, 1, 4))}, r"k must be \(B, L, G, width\)"),
        ({"v": ones((2, 5, 1, 3), jnp.bfloat16)}, "v must be float32 since the cache"),
        ({"segment_ids": ones((2, 4), jnp.int32)}, r"segment_ids must be \(B, L\)"),
    ],
)
def test_bad_arguments_of_the_cache_are_named(changed, message):
    cache = Cache.empty(2, 10, 1, 5, 3, interval=2, dtype=jnp.float32)
    args = {"k": jnp.ones((2, 5, 1, 5)), "v": jnp.ones((2, 5, 1, 3)), "interval": 2}
    with pytest.raises(ValueError, match=message):
        cache.extend(**(args | changed))


def test_checked_finds_bad_values_under_jit():
    checked = pallas_kernels.checked(checkpoint_attention)
    run = jax.jit(lambda ids, offset: checked(**GOOD, segment_ids=ids, offset=offset)[0])
    ones, zeros = jnp.ones((2, 5), jnp.int32), jnp.zeros(2, jnp.int32)
    run(ones, zeros).throw()
    with pytest.raises(Exception, match="padding"):
        run(jnp.asarray([[1, 0, 1, 1, 1]] * 2, jnp.int32), zeros).throw()
    with pytest.raises(Exception, match="offset must be at least 0"):
        run(ones, zeros - 1).throw()
