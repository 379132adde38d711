"""The op against its sequential oracle: the reference and the portable path."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import delta_rule
from pallas_kernels.delta_rule import xla
from pallas_kernels.delta_rule.shapes import SHAPES, Shape, case
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.tools import testing
from tests import tolerances
from tests.pallas_kernels.delta_rule.cases import DECAYS, Case, assert_isolated
from tests.tiers import compiled_as_users

IMPLEMENTATIONS = ("reference", "xla")
LENGTHS = [
    *((65, decay, True) for decay in DECAYS),
    *(pytest.param(65, decay, False, marks=pytest.mark.full) for decay in DECAYS),
    (1, "key", False),
    (1, "head", True),
    (2, None, False),
    (15, "key", True),
    (63, "head", False),
    (1000, "head", True),
]


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def assert_same(first, second):
    for old, new in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.full("1000-head-True", "65-key-True")
@pytest.mark.parametrize(
    ("length", "decay", "packed"),
    compiled_as_users(
        LENGTHS, lambda length, decay, packed: (length, decay) in ((65, "key"), (1000, "head"))
    ),
)
def test_xla_equals_the_oracle(length, decay, packed):
    case = Case(length=length, decay=decay, packed=packed)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_a_few_rows_at_a_time():
    """As many as make a step worth its while; all cases here have a block of two and one of one."""
    sizes = xla.cut(Config(1.0), 3, 65, 4)
    assert (sizes.blocks, sizes.rows, sizes.steps, sizes.size) == (2, 2, 3, 32)
    assert xla.cut(Config(1.0), 5, 9, 32)[2:] == (5, 1, 1, 16)


@pytest.mark.full
def test_xla_keeps_double_precision():
    with jax.enable_x64(True):
        case = Case(length=65, decay="key", dtype="float64", packed=True)
        actual = case.run("xla")
        assert actual["outputs"][0].dtype == jnp.float64
        testing.assert_close(actual, case.run("reference"), testing.FLOAT64_TOLERANCE)


def test_the_oracle_is_the_recurrence():
    case = Case(length=9, batch=1, decay="key", scale=0.3)
    q, k, v, beta, g, S = (np.asarray(x, np.float64)[0] for x in case.args.values())
    expected = np.zeros_like(v)
    for t in range(9):
        for h in range(4):
            decayed = np.exp(g[t, h])[:, None] * S[h]
            key = k[t, h // 2]
            S[h] = decayed + beta[t, h] * np.outer(key, v[t, h] - decayed.T @ key)
            expected[t, h] = 0.3 * S[h].T @ q[t, h // 2]
    o, final = case.run("reference")["outputs"]
    testing.assert_close(o[0], expected, testing.FLOAT32_TOLERANCE)
    testing.assert_close(final[0], S, testing.FLOAT32_TOLERANCE)


def test_bfloat16_against_the_oracle():
    case = Case(length=65, dtype="bfloat16")
    actual, expected = case.run("xla"), case.oracle()
    assert actual["outputs"][0].dtype == jnp.bfloat16
    assert actual["outputs"][1].dtype == jnp.float32
    assert {n: g.dtype for n, g in actual["gradients"].items()} == {
        n: x.dtype for n, x in case.args.items()
    }
    testing.assert_close(actual["outputs"], expected["outputs"], testing.BFLOAT16_TOLERANCE)
    testing.assert_close(actual["gradients"], expected["gradients"], tolerances.BFLOAT16_GRADIENTS)


def test_narrow_gates_beside_wide_tokens():
    case = Case(length=15)
    narrow = {n: case.args[n].astype(jnp.bfloat16) for n in ("beta", "log_decay")}
    actual = case.run("xla", args=case.args | narrow)
    assert actual["gradients"]["log_decay"].dtype == jnp.bfloat16
    case.args |= {n: x.astype(jnp.float32) for n, x in narrow.items()}
    testing.assert_close(actual, case.oracle(), testing.BFLOAT16_TOLERANCE)


# Gates at their ends.


@pytest.mark.always("key")
@pytest.mark.parametrize("decay", ["head", "key"])
def test_extreme_gates(decay):
    """Decays that do nothing, next to nothing, nearly all and all, in any order; beta 0 and 1."""
    case = Case(length=65, decay=decay)
    rng = np.random.default_rng(1)
    shape = case.args["log_decay"].shape
    chosen = rng.choice([0, -1e-6, -30, -1e4], shape, p=[0.45, 0.45, 0.05, 0.05])
    case.args |= {
        "log_decay": jnp.asarray(chosen, jnp.float32),
        "beta": jnp.asarray(rng.choice([0.0, 1.0], case.args["beta"].shape), jnp.float32),
    }
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("value", [-1e-6, -30.0, -1e4])
def test_every_decay_extreme(value):
    case = Case(length=65)
    case.args["log_decay"] = jnp.full_like(case.args["log_decay"], value)
    actual, expected = case.run("xla"), case.oracle()
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_same_key_again_and_again(decay):
    """beta = 1 and equal keys: the inverse is bidiagonal, its power series would cancel to it."""
    case = Case(length=65, decay=decay)
    k = case.args["k"]
    case.args |= {
        "k": jnp.broadcast_to(k[:, :1], k.shape),
        "beta": jnp.ones_like(case.args["beta"]),
    }
    if decay:
        case.args["log_decay"] = 1e-3 * case.args["log_decay"]
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_decays_that_say_the_same():
    case = Case(length=65, decay="key")
    whole = dict(case.args)
    heads = case.args.pop("log_decay")[..., 0]
    keys = jnp.broadcast_to(heads[..., None], whole["log_decay"].shape)
    for head, key, plain in ((0 * heads, 0 * keys, True), (heads, keys, False)):
        by_head = case.run("xla", args=case.args | {"log_decay": head})
        by_key = case.run("xla", args=case.args | {"log_decay": key})
        by_key["gradients"]["log_decay"] = by_key["gradients"]["log_decay"].sum(-1)
        testing.assert_close(by_key, by_head, testing.FLOAT32_TOLERANCE)
        if plain:
            del by_head["gradients"]["log_decay"]
            testing.assert_close(case.run("xla"), by_head, testing.FLOAT32_TOLERANCE)


def test_grouped_heads_are_repeated_heads():
    case = Case(length=65)
    grouped = case.run("xla")
    repeated = {n: jnp.repeat(case.args[n], 2, axis=2) for n in ("q", "k")}
    heads = case.run("xla", args=case.args | repeated)
    for name in repeated:
        x = heads["gradients"][name]
        heads["gradients"][name] = x.reshape(*x.shape[:2], 2, 2, -1).sum(3)
    testing.assert_close(grouped, heads, testing.FLOAT32_TOLERANCE)


# Keys that are not normalised: what the docstring promises.


def test_corrections_up_to_reflections():
    """beta |k|^2 = 2: every correction is a reflection, nothing grows."""
    case = Case(length=65, decay=None)
    case.args |= {"k": case.args["k"] * 2, "beta": jnp.full_like(case.args["beta"], 0.5)}
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_an_overflow_is_seen_and_stays_in_its_document():
    case = Case(length=65, decay=None)
    ids = np.repeat([[1, 2]], [40, 25], axis=1).repeat(3, 0).astype(np.int32)
    inside = jnp.asarray(ids == 1)[..., None, None]
    case.args["k"] = jnp.where(inside, 1e3, 1.0) * case.args["k"]
    o = np.asarray(case.run("xla", ids=jnp.asarray(ids))["outputs"][0])
    assert not np.isfinite(o[:, 39]).any()
    assert np.isfinite(o[ids == 2]).all()


# Documents.


@pytest.mark.always("xla-head")
@pytest.mark.parametrize(
    ("implementation", "decay"), [("reference", "head"), ("xla", "head"), ("xla", "key")]
)
def test_packed_equals_one_document_a_row(implementation, decay):
    case = Case(length=65, decay=decay)
    lengths = [20, 1, 17, 11, 16]
    ids = np.repeat([1, 2, 3, 1, 0], lengths)
    o, final = case.run(implementation, ids=jnp.asarray(np.stack([ids] * 3), jnp.int32))["outputs"]
    for start, length in zip([0, 20, 21, 38], lengths, strict=False):
        # The document alone, followed by what is padding then: one program for all.
        args = {n: jnp.roll(x, -start, axis=1) for n, x in case.args.items() if n in case.tokens}
        state = case.args["initial_state"]
        args["initial_state"] = state if start == 0 else jnp.zeros_like(state)
        alone = jnp.broadcast_to(jnp.arange(65) < length, (3, 65)).astype(jnp.int32)
        expected, after = case.run("reference", args=args, ids=alone)["outputs"]
        actual = o[:, start : start + length]
        testing.assert_close(actual, expected[:, :length], testing.FLOAT32_TOLERANCE)
    testing.assert_close(final, after, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(o[:, 49:], 0)


@pytest.mark.parametrize(
    ("implementation", "decay"), [("reference", "head"), *(("xla", decay) for decay in DECAYS)]
)
def test_documents_are_isolated_to_the_bit(implementation, decay):
    case = Case(length=65, decay=decay)
    assert_isolated(functools.partial(case.run, implementation), case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_padding_holds_is_never_seen(implementation):
    case = Case(length=65)
    ids = jnp.asarray(np.repeat([[1, 2, 0]], [28, 15, 22], axis=1).repeat(3, 0), jnp.int32)

    def huge(x):
        return jnp.where((ids == 0).reshape(3, 65, *[1] * (x.ndim - 2)), -1e30, x)

    before = case.run(implementation, ids=ids)
    after = {n: huge(x) if n in case.tokens else x for n, x in case.args.items()}
    assert_same(before, case.run(implementation, ids=ids, args=after))


@pytest.mark.parametrize("length", [1, 65])
def test_a_row_of_padding_returns_its_initial_state(length):
    case = Case(length=length)
    result = case.run("xla", ids=jnp.zeros((3, length), jnp.int32))
    gradients = dict(result["gradients"])
    np.testing.assert_array_equal(result["outputs"][0], 0)
    np.testing.assert_array_equal(result["outputs"][1], case.args["initial_state"])
    np.testing.assert_array_equal(gradients.pop("initial_state"), case.cotangents[1])
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    decay=st.sampled_from(DECAYS),
    seed=st.integers(0, 2**16),
)
def test_any_documents(lengths, decay, seed):
    case = Case(length=65, decay=decay, seed=seed)
    ids = np.zeros((3, 65), np.int32)
    ids[0] = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, 65])[:65]
    ids[1] = np.repeat([*range(1, len(lengths) + 1), 9], [*lengths[::-1], 65])[:65]
    ids[2] = 4
    case.ids = jnp.asarray(ids)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


# Calls in pieces, twice, and inside of transformations.


@pytest.mark.full("split-head")
@pytest.mark.parametrize("decay", ["head", "key"])
@pytest.mark.parametrize("cuts", [[0, 11, 22, 33], list(range(34))], ids=["split", "steps"])
def test_whole_equals_split_equals_step_by_step(decay, cuts):
    case = Case(length=33, decay=decay)
    run = jax.jit(delta_rule)
    whole, final = run(**case.args)
    state, parts = case.args["initial_state"], []
    for start, stop in itertools.pairwise(cuts):
        args = {n: case.args[n][:, start:stop] for n in case.tokens}
        part, state = run(**args, initial_state=state)
        parts.append(part)
    testing.assert_close(jnp.concatenate(parts, 1), whole, testing.FLOAT32_TOLERANCE)
    testing.assert_close(state, final, testing.FLOAT32_TOLERANCE)


def test_a_decoding_step_has_no_loop():
    step = str(jax.make_jaxpr(lambda args: delta_rule(**args))(Case(length=1).args))
    assert "mul" in step
    assert not any(word in step for word in ("scan[", "while[", "custom_vjp"))


def test_the_same_call_twice_is_bitwise_equal():
    case = Case(length=65, packed=True)
    assert_same(case.run("xla"), case.run("xla"))


@pytest.mark.full
def test_rows_folded_mapped_and_on_several_devices():
    """`jax.vmap` equals folding into the batch, and so does `jax.shard_map` with checked types."""
    case = Case(length=40, batch=4)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def loss(args):
        o, final = delta_rule(**args)
        return jnp.sum(jnp.sin(o)) + jnp.sum(final * final)

    gradient = jax.grad(loss)
    folded = jax.jit(gradient)(case.args)
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), case.args)
    mapped = jax.jit(jax.vmap(gradient))(split)
    mapped = jax.tree.map(lambda x, like: x.reshape(like.shape), mapped, folded)
    testing.assert_close(mapped, folded, testing.FLOAT32_TOLERANCE)
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec))
    testing.assert_close(sharded(case.args), folded, testing.FLOAT32_TOLERANCE)


def test_second_order_and_forward_mode_through_the_reference():
    case = Case(length=4, batch=1, groups=1, heads=1, size=(3, 2))

    def loss(k):
        return delta_rule(**case.args | {"k": k}, implementation="reference")[0].sum()

    k = case.args["k"]
    _, tangent = jax.jit(lambda k: jax.jvp(loss, (k,), (jnp.ones_like(k),)))(k)
    np.testing.assert_allclose(
        tangent, jax.jit(jax.grad(loss))(k).sum(), **tolerances.EACH_FLOAT32_TOTAL
    )
    assert np.isfinite(jax.jit(jax.hessian(loss))(k)).all()


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_residuals_are_at_most_inputs_outputs_and_one_state_a_chunk(implementation):
    args = Shape("deep", "a test", 1, 1024, 2, 2, 128, 128, "head", state=True).operands()

    def pullback(a):
        return jax.vjp(lambda a: delta_rule(**a, implementation=implementation), a)[1]

    held = sum(x.size for x in jax.tree.leaves(jax.eval_shape(pullback, args)))
    states = 1024 // 32 * args["initial_state"].size
    assert states // 16 < held <= sum(x.size for x in args.values()) + args["v"].size + states


@pytest.mark.full
def test_training_in_bfloat16():
    """200 steps of gradient descent on associative recall; finite all along, and it learns."""
    rng = np.random.default_rng(0)
    width, tokens = 16, 32
    x = jnp.asarray(rng.standard_normal((4, tokens, width)), jnp.float32)
    x = jnp.concatenate([x, x], axis=1)  # to be recalled in the second half
    weights = jnp.asarray(rng.standard_normal((5, width, width)) / 4, jnp.float32)

    def unit(x):
        return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)

    def loss(weights):
        q, k, v, gate, decay = jnp.einsum("bld,nde->nble", x, weights)
        q, k, v = (z[:, :, None].astype(jnp.bfloat16) for z in (unit(q), unit(k), v))
        beta = jax.nn.sigmoid(gate[..., :1]).astype(jnp.bfloat16)
        o, _ = delta_rule(q, k, v, beta, -jax.nn.softplus(decay[..., :1] - 2), scale=1.0)
        return jnp.mean((o[:, tokens:, 0].astype(jnp.float32) - x[:, tokens:]) ** 2)

    def step(weights, _):
        value, gradient = jax.value_and_grad(loss)(weights)
        return weights - 0.5 * gradient, value

    weights, losses = jax.jit(lambda w: jax.lax.scan(step, w, None, length=200))(weights)
    assert np.isfinite(losses).all()
    assert np.isfinite(weights).all()
    assert losses[-1] < 0.5 * losses[0]


# What is refused, and where what runs.


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


BAD = [
    ("v rank", {"v": zeros(2, 5, 4)}, r"v must be \(B, L, H, V\), got shape \(2, 5, 4\)"),
    ("v empty", {"v": zeros(2, 5, 4, 0)}, "v must not be empty"),
    ("v dtype", {"v": zeros(2, 5, 4, 6, dtype=np.int32)}, "v must be float32 .* got int32"),
    ("v wide", {"v": zeros(2, 5, 4, 257)}, "K and V go up to 256, got K = 8 and V = 257"),
    ("q", {"q": zeros(2, 4, 2, 8)}, r"q must be \(B, L, G, K\)"),
    ("q empty", {"q": zeros(2, 5, 0, 8), "k": zeros(2, 5, 0, 8)}, "q must not be empty"),
    ("q dtype", {"q": jnp.zeros((2, 5, 2, 8), jnp.bfloat16)}, "q must be float32 since v is"),
    ("k", {"k": zeros(2, 5, 2, 7)}, r"k must be \(B, L, G, K\) = \(2, 5, 2, 8\)"),
    ("groups", {"q": zeros(2, 5, 3, 8), "k": zeros(2, 5, 3, 8)}, "G must divide H, got q with G"),
    ("beta", {"beta": zeros(2, 5, 2)}, r"beta must be \(B, L, H\) = \(2, 5, 4\)"),
    ("beta dtype", {"beta": zeros(2, 5, 4, dtype=np.float16)}, "beta must be float32 or bfloat16"),
    ("decay", {"log_decay": zeros(2, 5, 2)}, r"log_decay must be \(B, L, H\)"),
    ("decay keys", {"log_decay": zeros(2, 5, 4, 6)}, r"log_decay must be .* = \(2, 5, 4, 8\)"),
    ("decay dtype", {"log_decay": zeros(2, 5, 4, dtype=np.int32)}, "log_decay must be float32"),
    ("decay value", {"log_decay": zeros(2, 5, 4) + 1}, r"log_decay must be at most 0, got 1\.0"),
    ("decay, jax", {"log_decay": jnp.ones((2, 5, 4))}, r"log_decay must be at most 0, got 1\.0"),
    ("state", {"initial_state": zeros(2, 4, 6, 8)}, r"initial_state must be .* \(2, 4, 8, 6\)"),
    (
        "state dtype",
        {"initial_state": jnp.zeros((2, 4, 8, 6), jnp.bfloat16)},
        "initial_state must be float32 .* got bfloat16",
    ),
    ("ids shape", {"segment_ids": zeros(2, 4)}, r"segment_ids must be \(B, L\)"),
    ("ids dtype", {"segment_ids": zeros(2, 5)}, "segment_ids must be int32"),
    ("ids value", {"segment_ids": zeros(2, 5, dtype=np.int32) - 1}, "segment_ids must be >= 0"),
    ("name", {"implementation": "cuda"}, "choose among reference, xla"),
]


@pytest.mark.parametrize(("changed", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(changed, message):
    q = zeros(2, 5, 2, 8)
    good = {"q": q, "k": q, "v": zeros(2, 5, 4, 6), "beta": zeros(2, 5, 4)}
    with pytest.raises(ValueError, match=message):
        delta_rule(**(good | changed))


def test_checked_finds_bad_values_under_jit():
    args = Case(length=5).args
    run = jax.jit(pallas_kernels.checked(delta_rule))
    error, _ = run(**args, segment_ids=jnp.ones((3, 5), jnp.int32))
    error.throw()
    error, _ = run(**args, segment_ids=jnp.array([[1, 0, 1, 1, 1]] * 3, jnp.int32))
    with pytest.raises(Exception, match=r"padding .* end of a row"):
        error.throw()
    error, _ = run(**args | {"log_decay": -args["log_decay"]})
    with pytest.raises(Exception, match="log_decay must be at most 0"):
        error.throw()


@pytest.mark.full
@pytest.mark.parametrize("name", ["gated-delta-bench-packed", "kimi-linear", "odd-plain"])
def test_named_shapes_are_accepted(name):
    fn, *operands = case(name, "xla", "forward+backward", "0.5")
    o, gradients = jax.eval_shape(fn, *operands)
    assert o.shape == (*SHAPES[name].scaled(0.5).operands()["v"].shape,)
    assert len(gradients) == len(operands) - 1 - SHAPES[name].segmented


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("gpt", "xla"), "shape='gpt'"), (("cpu", "xla", "sideways"), "mode='sideways'")],
)
def test_unknown_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        case(*arguments)


@pytest.mark.full
@pytest.mark.optimised
def test_one_token_without_a_state_is_the_same_every_time():
    """At a size where XLA made a program of it that read memory which nothing had written."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(0, 1 / 16, (2, 1, 6, 256)), jnp.float32) for _ in range(2))
    v = jnp.asarray(rng.normal(size=(2, 1, 12, 256)), jnp.float32)
    beta = jnp.asarray(rng.random((2, 1, 12)), jnp.float32)
    written = np.asarray(beta)[..., None] * np.asarray(v)
    both = np.repeat(np.stack([q, k]), 2, axis=3)[:, :, 0].astype(np.float64)
    state = both[1][..., None] * written[:, 0, :, None].astype(np.float64)
    expected = np.einsum("bhk,bhkv->bhv", both[0], state) / 16
    log_decay = jnp.asarray(-rng.random((2, 1, 12)), jnp.float32)  # of a state of zeros
    for _ in range(5):
        o, final = jax.jit(lambda *args: delta_rule(*args))(q, k, v, beta, log_decay)
        testing.assert_close((o[:, 0], final), (expected, state), testing.FLOAT32_TOLERANCE)
