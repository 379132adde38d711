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
from pallas_kernels import linear_attention
from pallas_kernels.linear_attention import xla
from pallas_kernels.linear_attention.shapes import Shape
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.tools import testing
from tests import tolerances
from tests.arrays import ones, zeros
from tests.pallas_kernels.linear_attention.cases import Case, assert_isolated
from tests.tiers import compiled_as_users


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def same_bits(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


# Each length and decay, packed and not; not the full product, compilation is slow.
PLAIN = [
    (1, "head", False),
    (1, "key", True),
    pytest.param(2, None, True, marks=pytest.mark.full),
    (2, "key", False),
    (15, "constant", True),
    (63, "head", True),
    pytest.param(63, None, False, marks=pytest.mark.full),
    (65, "key", True),
    pytest.param(65, "constant", False, marks=pytest.mark.full),
    (1000, "head", True),
    (1000, "key", False),
]


@pytest.mark.full("1000-head-True", "1000-key-False", "63-head-True")
@pytest.mark.parametrize(
    ("length", "decay", "packed"),
    compiled_as_users(PLAIN, lambda length, decay, packed: length >= 65),
)
def test_xla_equals_the_oracle(length, decay, packed):
    case = Case(length=length, decay=decay, packed=packed, groups=2, heads=4, batch=1)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("decay", ["head", "key"])
def test_xla_keeps_double_precision(decay):
    with jax.enable_x64(True):
        case = Case(length=130, decay=decay, dtype="float64", packed=True)
        result = case.run("xla")
        assert {x.dtype for x in jax.tree.leaves(result)} == {np.dtype("float64")}
        testing.assert_close(result, case.run("reference"), testing.FLOAT64_TOLERANCE)


def test_the_oracle_is_the_recurrence():
    args = {k: np.asarray(v, np.float64)[0] for k, v in Case(length=6, decay="key").args.items()}
    state, outputs = args["initial_state"], []
    for t in range(6):
        state = np.exp(args["log_decay"][t])[:, :, None] * state
        state = state + np.einsum("k,hv->hkv", args["k"][t, 0], args["v"][t])
        outputs.append(5**-0.5 * np.einsum("k,hkv->hv", args["q"][t, 0], state))
    o, final = Case(length=6, decay="key").run("reference")["outputs"]
    np.testing.assert_allclose(o[0], outputs, **tolerances.EACH_FLOAT32_LAYER)
    np.testing.assert_allclose(final[0], state, **tolerances.EACH_FLOAT32_LAYER)


@pytest.mark.always("constant-False")
@pytest.mark.parametrize(
    ("decay", "packed"), [("head", True), ("key", True), ("constant", False), (None, False)]
)
def test_bfloat16_against_the_float32_oracle(decay, packed):
    sizes = {"key_size": 32, "value_size": 16}
    case = Case(length=200, decay=decay, dtype="bfloat16", packed=packed, **sizes)
    actual, expected = case.run("xla"), case.oracle()
    assert actual["outputs"][0].dtype == jnp.bfloat16
    assert actual["outputs"][1].dtype == jnp.float32
    testing.assert_close(actual["outputs"], expected["outputs"], tolerances.BFLOAT16)
    testing.assert_close(actual["gradients"], expected["gradients"], tolerances.BFLOAT16_GRADIENTS)


@pytest.mark.always("head-xla")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("decay", ["head", "key"])
def test_packed_equals_one_document_a_row(implementation, decay):
    case = Case(length=150, packed=True, batch=1, decay=decay)
    ids = np.asarray(case.ids[0])
    args = dict(case.args)
    initial = args.pop("initial_state")
    run = jax.jit(functools.partial(linear_attention, implementation=implementation))
    o, final = run(**args, initial_state=initial, segment_ids=case.ids)
    real = int((ids != 0).sum())
    borders = [0, *(np.flatnonzero(np.diff(ids[:real])) + 1), real]
    run = jax.jit(functools.partial(linear_attention, implementation="reference"))
    for start, stop in itertools.pairwise(borders):
        alone, after = run(
            **{name: x[:, start:stop] for name, x in args.items()},
            initial_state=initial if start == 0 else jnp.zeros_like(initial),
        )
        testing.assert_close(o[:, start:stop], alone, testing.FLOAT32_TOLERANCE)
    testing.assert_close(final, after, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(o[:, real:], 0)


@pytest.mark.always("xla-head")
@pytest.mark.parametrize(
    ("implementation", "decay"),
    [("reference", "key"), ("xla", None), ("xla", "head"), ("xla", "key")],
)
def test_documents_are_isolated_to_the_bit(implementation, decay):
    case = Case(length=100, decay=decay)
    assert_isolated(lambda case, ids: case.run(implementation, ids=ids), case)


@pytest.mark.parametrize("decay", [None, "key"])
def test_a_row_of_padding_returns_its_initial_state(decay):
    case = Case(length=20, decay=decay)
    result = case.run("xla", ids=jnp.zeros((2, 20), jnp.int32))
    np.testing.assert_array_equal(result["outputs"][0], 0)
    np.testing.assert_array_equal(result["outputs"][1], case.args["initial_state"])
    gradients = result["gradients"]
    np.testing.assert_array_equal(gradients.pop("initial_state"), case.cotangents[1])
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.full("split-head", "split-constant")
@pytest.mark.parametrize("decay", ["constant", "head", "key"])
@pytest.mark.parametrize("cuts", [[0, 7, 40, 70], list(range(71))], ids=["split", "steps"])
def test_whole_equals_split_equals_step_by_step(decay, cuts):
    args = dict(Case(length=70, decay=decay).args)
    state, parts = args.pop("initial_state"), []
    run = jax.jit(linear_attention)
    whole, final = run(**args, initial_state=state)
    for start, stop in itertools.pairwise(cuts):
        part = {
            name: x if x is None or x.ndim == 1 else x[:, start:stop] for name, x in args.items()
        }
        o, state = run(**part, initial_state=state)
        parts.append(o)
    testing.assert_close(jnp.concatenate(parts, 1), whole, testing.FLOAT32_TOLERANCE)
    testing.assert_close(state, final, testing.FLOAT32_TOLERANCE)


@pytest.mark.always("key")
@pytest.mark.parametrize("decay", ["head", "key"])
def test_extreme_decays(decay):
    extreme = np.asarray([0.0, -1e-6, -30.0, -1e4], np.float32)
    case = Case(length=130, decay=decay, batch=5)
    shape = case.args["log_decay"].shape
    rows = [np.full(shape[1:], value) for value in extreme]
    rows.append(np.random.default_rng(1).choice(extreme, shape[1:]))
    case = case.replaced(log_decay=jnp.asarray(np.stack(rows), jnp.float32))
    actual, expected = case.run("xla"), case.oracle()
    for row in range(5):
        outputs = jax.tree.map(lambda x, row=row: x[row], (actual, expected))
        testing.assert_close(*outputs, testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_the_decays_coincide_where_they_say_the_same():
    case = Case(length=70, decay="constant")
    constant = case.args["log_decay"]
    head = jnp.broadcast_to(constant, (2, 70, 2))
    key = jnp.broadcast_to(head[..., None], (2, 70, 2, 5))
    results = [case.replaced(log_decay=g).run("xla") for g in (constant, head, key)]
    for result in results:
        g = result["gradients"].pop("log_decay")
        axes = {1: (), 3: (0, 1), 4: (0, 1, 3)}[g.ndim]
        result["total"] = g.sum(axes)
    for result in results[1:]:
        testing.assert_close(result, results[0], testing.FLOAT32_TOLERANCE)
    zero = [case.replaced(log_decay=g).run("xla") for g in (None, jnp.zeros(2), 0 * key)]
    for result in zero:
        del result["gradients"]["log_decay"]
    for result in zero[1:]:
        testing.assert_close(result, zero[0], testing.FLOAT32_TOLERANCE)


def test_grouped_heads_equal_repeated_queries_and_keys():
    case = Case(length=40, groups=2, heads=6, decay="key")
    repeated = {name: jnp.repeat(case.args[name], 3, axis=2) for name in ("q", "k")}
    grouped, full = case.run("xla"), case.replaced(**repeated).run("xla")
    for name in ("q", "k"):
        gradient = full["gradients"][name]
        full["gradients"][name] = gradient.reshape(2, 40, 2, 3, 5).sum(3)
    testing.assert_close(grouped, full, testing.FLOAT32_TOLERANCE)


def test_the_same_call_twice_is_bitwise_equal():
    case = Case(length=129, decay="key", packed=True)
    same_bits(case.run("xla"), case.run("xla"))


@pytest.mark.full
def test_vmap_equals_folding_into_the_batch():
    args = Case(length=30, batch=6).args

    def loss(args):
        args = dict(args)
        o, final = linear_attention(**args)
        return jnp.sum(jnp.sin(o)) + jnp.sum(final * final)

    folded = jax.jit(jax.grad(loss))(args)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(
        jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), args)
    )
    mapped = jax.tree.map(lambda x, y: x.reshape(y.shape), mapped, folded)
    testing.assert_close(mapped, folded, testing.FLOAT32_TOLERANCE)


def test_second_order_and_forward_mode_through_the_reference():
    args = dict(Case(length=4, decay="key").args)
    g = args.pop("log_decay")

    def loss(g):
        return linear_attention(**args, log_decay=g, implementation="reference")[0].sum()

    _, tangent = jax.jit(lambda g: jax.jvp(loss, (g,), (jnp.ones_like(g),)))(g)
    np.testing.assert_allclose(
        tangent, jax.jit(jax.grad(loss))(g).sum(), **tolerances.EACH_FLOAT32_TOTAL
    )
    assert np.isfinite(jax.jit(jax.hessian(loss))(g)).all()


def test_backward_keeps_one_state_a_chunk_and_no_pairs():
    case = Case(length=1024, decay="head", batch=1, key_size=16, value_size=16)
    args = case.args
    segment_index = None

    def forward(q, k, v, g, initial):
        return xla.BACKEND(Config(1.0), q, k, v, g, initial, segment_index)

    _, pullback = jax.eval_shape(lambda *x: jax.vjp(forward, *x), *args.values())
    kept = sum(x.size for x in jax.tree.leaves(pullback))
    inputs = sum(x.size for x in args.values())
    states = 1024 // 64 * 2 * 16 * 16
    assert kept <= inputs + states + 2048


@pytest.mark.full
@hypothesis.settings(max_examples=8)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    padding=st.integers(0, 20),
    decay=st.sampled_from([None, "head", "key"]),
    seed=st.integers(0, 99),
)
def test_any_segmentation(lengths, padding, decay, seed):
    total = 96  # one length, so that little is compiled
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[: total - padding]
    ids = np.pad(ids, (0, total - padding - len(ids)), constant_values=7)
    ids = np.pad(ids, (0, padding))
    case = Case(length=total, batch=1, decay=decay, seed=seed)
    ids = jnp.asarray(ids[None], jnp.int32)
    expected = case.run("reference", ids=ids)
    testing.assert_close(case.run("xla", ids=ids), expected, tolerances.FLOAT32_BOTH)


@pytest.mark.full
def test_training_in_bfloat16_stays_finite_and_learns():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 64, 16)), jnp.bfloat16)
    target = jnp.roll(x, 2, axis=1)
    weights = jnp.asarray(rng.standard_normal((4, 16, 16)) / 4, jnp.float32)

    def loss(weights):
        q, k, v, g = (jnp.dot(x, w.astype(x.dtype)).reshape(4, 64, 2, 8) for w in weights)
        decay = jax.nn.log_sigmoid(g.astype(jnp.float32))
        o, _ = linear_attention(q, k, v, decay)
        error = o.reshape(target.shape).astype(jnp.float32) - target.astype(jnp.float32)
        return jnp.mean(error**2)

    @jax.jit
    def step(weights, _):
        value, gradient = jax.value_and_grad(loss)(weights)
        return weights - 0.3 * gradient, value

    _, losses = jax.lax.scan(step, weights, length=200)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]


GOOD = {
    "q": ones((2, 5, 2, 3)),
    "k": ones((2, 5, 2, 3)),
    "v": ones((2, 5, 4, 6)),
    "log_decay": zeros((2, 5, 4)),
}
BAD = [
    ("v rank", {"v": ones((2, 5, 4))}, r"v must be \(B, L, H, V\), got shape \(2, 5, 4\)"),
    ("q length", {"q": ones((2, 4, 2, 3))}, r"q must be \(B, L, G, K\)"),
    ("k like q", {"k": ones((2, 5, 1, 3))}, r"k must be .* got shape \(2, 5, 1, 3\)"),
    ("groups", {"q": ones((2, 5, 3, 3)), "k": ones((2, 5, 3, 3))}, "G must divide H"),
    ("wide", {"v": ones((2, 5, 4, 257))}, "up to 256, got K = 3 and V = 257"),
    ("empty", {"v": ones((2, 5, 4, 0))}, "v must not be empty"),
    ("dtype", {"v": ones((2, 5, 4, 6), jnp.int32)}, "v must be float32 .* got int32"),
    ("mixed", {"q": ones((2, 5, 2, 3), jnp.bfloat16)}, "q must be float32 since v is float32"),
    ("decay rank", {"log_decay": zeros((2, 5))}, r"log_decay must be \(H,\), \(B, L, H\) or"),
    ("decay shape", {"log_decay": zeros((2, 5, 2))}, r"log_decay must be \(B, L, H\)"),
    ("decay dtype", {"log_decay": zeros(4, jnp.int32)}, "log_decay must be float32 or bfloat"),
    ("decay sign", {"log_decay": np.full(4, 0.5, np.float32)}, "must be at most 0, got 0.5"),
    ("decay sign, jax", {"log_decay": jnp.full(4, 0.5)}, "must be at most 0, got 0.5"),
    ("state", {"initial_state": ones((2, 4, 6, 3))}, r"initial_state must be \(B, H, K, V\)"),
    (
        "state dtype",
        {"initial_state": ones((2, 4, 3, 6), jnp.bfloat16)},
        "initial_state must be float32 since v is float32, got bfloat16",
    ),
    ("ids shape", {"segment_ids": jnp.ones((2, 4), jnp.int32)}, r"segment_ids must be \(B, L\)"),
    ("ids value", {"segment_ids": -jnp.ones((2, 5), jnp.int32)}, "segment_ids must be >= 0"),
    ("name", {"implementation": "cuda"}, "choose among reference, xla"),
]


@pytest.mark.parametrize(("changed", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**(GOOD | changed))


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_residuals_are_at_most_inputs_outputs_and_one_state_a_chunk(implementation):
    shape = Shape("deep", "a test", 1, 1024, 1, 2, 128, 128, "head")
    args = tuple(shape.operands().values())
    op = functools.partial(linear_attention, implementation=implementation)
    pullback = jax.eval_shape(lambda *a: jax.vjp(op, *a)[1], *args)
    held = sum(x.size for x in jax.tree.leaves(pullback))
    states = 1024 // 32 * 2 * 128 * 128
    assert states // 16 < held <= sum(x.size for x in args) + args[2].size + states


def test_checked_finds_positive_decays_under_jit():
    run = jax.jit(pallas_kernels.checked(linear_attention))
    error, _ = run(**GOOD)
    error.throw()
    error, _ = run(**(GOOD | {"log_decay": jnp.full((2, 5, 4), 0.1)}))
    with pytest.raises(Exception, match="log_decay must be at most 0"):
        error.throw()
