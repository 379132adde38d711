"""The op against its sequential oracle: every implementation, one body of tests."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels import causal_conv1d
from pallas_kernels.tools import testing
from tests import tolerances
from tests.arrays import ones
from tests.pallas_kernels.causal_conv1d.cases import Case, assert_isolated
from tests.tiers import compiled_as_users


@pytest.fixture(autouse=True, scope="module")
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


KINDS = [
    (1, 4, "silu"),
    (2, 4, None),
    pytest.param(2, 8, "silu", marks=pytest.mark.full),
    (15, 1, "silu"),
    pytest.param(17, 2, None, marks=pytest.mark.full),
    (63, 3, "silu"),
    (65, 4, None),
    pytest.param(65, 12, "silu", marks=pytest.mark.full),
    (1000, 4, "silu"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "conv_size", "activation"),
    compiled_as_users(KINDS, lambda length, conv_size, activation: length >= 65),
)
def test_xla_equals_the_oracle(length, conv_size, activation, packed):
    case = Case(length=length, conv_size=conv_size, activation=activation, packed=packed)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_xla_sums_weight_gradients_in_many_turns_and_a_rest():
    case = Case(length=203, batch=3, width=300, packed=True)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("length", [2, 70])
def test_xla_keeps_double_precision(length):
    with jax.enable_x64(True):
        case = Case(length=length, dtype="float64", packed=True)
        actual = case.run("xla")
        assert actual["outputs"][0].dtype == jnp.float64
        testing.assert_close(actual, case.run("reference"), testing.FLOAT64_TOLERANCE)


def test_the_oracle_is_the_convolution():
    case = Case(length=9, conv_size=3)
    x, weight, bias, initial = (np.asarray(a, np.float64) for a in case.args)
    rows = np.concatenate([initial, x], axis=1)
    pre = bias + sum(weight[j] * rows[:, j : j + 9] for j in range(3))
    y, final = case.run("reference")["outputs"]
    testing.assert_close(y, pre / (1 + np.exp(-pre)), testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(final, rows[:, -2:])


def test_bfloat16_against_the_float32_oracle():
    case = Case(length=100, dtype="bfloat16", packed=True)
    actual = case.run("xla")
    assert {x.dtype.name for x in actual["outputs"]} == {"bfloat16"}
    assert [g.dtype.name for g in actual["gradients"]] == [
        "bfloat16",
        "float32",
        "float32",
        "bfloat16",
    ]
    testing.assert_close(actual, case.oracle(), testing.BFLOAT16_TOLERANCE)


@pytest.mark.always("lengths0-xla", "lengths1-xla")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("lengths", [(9, 1, 2, 6, 5), (2, 1, 20), (1, 1), (30, 2)])
def test_packed_equals_one_document_a_row(implementation, lengths):
    real, padding = sum(lengths), 3
    x, weight, bias, initial = Case(length=real + padding, batch=1, conv_size=5).args
    ids = np.zeros((1, real + padding), np.int32)
    borders = [0, *np.cumsum(lengths)]
    documents = [slice(*pair) for pair in itertools.pairwise(borders)]
    for i, document in enumerate(documents):
        ids[:, document] = i % 2 + 1
    conv = functools.partial(causal_conv1d, activation="silu", implementation=implementation)
    conv = jax.jit(conv)
    y, final = conv(x, weight, bias, initial_state=initial, segment_ids=jnp.asarray(ids))
    for document in documents:
        carried = initial if document == documents[0] else None
        alone, after = conv(x[:, document], weight, bias, initial_state=carried)
        testing.assert_close(y[:, document], alone, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(final, after)
    np.testing.assert_array_equal(y[:, real:], 0)


@pytest.mark.parametrize(
    ("implementation", "length", "activation"),
    [("reference", 9, "silu"), ("xla", 9, None), ("xla", 66, None), ("xla", 66, "silu")],
)
def test_documents_are_isolated_to_the_bit(implementation, length, activation):
    case = Case(length=length, activation=activation)
    assert_isolated(functools.partial(case.run, implementation), case)


@pytest.mark.parametrize("length", [5, 20])
def test_a_row_of_padding_returns_its_initial_state(length):
    case = Case(length=length)
    nans = (case.args[0] * jnp.nan, *case.args[1:])
    result = case.run("xla", args=nans, ids=jnp.zeros((2, length), jnp.int32))
    np.testing.assert_array_equal(result["outputs"][0], 0)
    np.testing.assert_array_equal(result["outputs"][1], case.args[3])
    for gradient in result["gradients"][:3]:
        np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(result["gradients"][3], case.cotangents[1])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("cuts", [[0, 2, 20, 33], list(range(34))], ids=["split", "steps"])
def test_whole_equals_split_equals_step_by_step(implementation, cuts):
    x, weight, bias, initial = Case(length=33).args
    run = jax.jit(functools.partial(causal_conv1d, implementation=implementation))
    whole, final = run(x, weight, bias, initial_state=initial)
    state, parts = initial, []
    for start, stop in itertools.pairwise(cuts):
        part, state = run(x[:, start:stop], weight, bias, initial_state=state)
        parts.append(part)
    testing.assert_close(jnp.concatenate(parts, 1), whole, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(state, final)


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e18])
def test_extreme_inputs(scale):
    case = Case(length=64, packed=True)
    case.args = (case.args[0] * scale, *case.args[1:])
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_no_bias_and_no_initial_state_are_zeros():
    x, weight, bias, initial = Case(length=20).args
    bare = causal_conv1d(x, weight)
    zeros = causal_conv1d(x, weight, bias * 0, initial_state=initial * 0)
    for a, b in zip(bare, zeros, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("length", [7, 129])
def test_the_same_call_twice_is_bitwise_equal(length):
    case = Case(length=length, packed=True)
    once, twice = jax.tree.leaves(case.run("xla")), jax.tree.leaves(case.run("xla"))
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_vmap_equals_folding_into_the_batch():
    x, weight, bias, initial = Case(length=30, batch=6).args

    def loss(x, initial):
        y, final = causal_conv1d(x, weight, bias, activation="silu", initial_state=initial)
        return jnp.sum(jnp.sin(y)) + jnp.sum(final * final)

    gradients = jax.grad(loss, (0, 1))
    folded = jax.jit(gradients)(x, initial)
    split = [a.reshape(3, 2, *a.shape[1:]) for a in (x, initial)]
    mapped = jax.jit(jax.vmap(gradients))(*split)
    mapped = [a.reshape(b.shape) for a, b in zip(mapped, folded, strict=True)]
    testing.assert_close(mapped, list(folded), testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_rows_sharded_over_devices_give_the_same_gradients(implementation):
    case = Case(length=20, packed=True)
    arguments = (*case.args, case.ids)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def loss(x, weight, bias, initial, ids):
        y, final = causal_conv1d(
            x,
            weight,
            bias,
            activation="silu",
            initial_state=initial,
            segment_ids=ids,
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(y)) + jnp.sum(final * final)

    sharded = jax.shard_map(
        lambda *args: jax.lax.psum(loss(*args), "data"),
        mesh=mesh,
        in_specs=(rows, whole, whole, rows, rows),
        out_specs=whole,
    )
    gradients = jax.jit(jax.grad(sharded, (0, 1, 2, 3)))
    if implementation != "xla":
        gradients.trace(*arguments)  # types of what varies over devices are checked here
        return
    expected = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arguments)
    testing.assert_close(gradients(*arguments), expected, testing.FLOAT32_TOLERANCE)


def test_second_order_and_forward_mode_through_the_reference():
    x, weight, bias, _ = Case(length=6).args

    def loss(x):
        return causal_conv1d(x, weight, bias, activation="silu", implementation="reference")[
            0
        ].sum()

    _, tangent = jax.jit(lambda x: jax.jvp(loss, (x,), (jnp.ones_like(x),)))(x)
    np.testing.assert_allclose(
        tangent, jax.jit(jax.grad(loss))(x).sum(), **tolerances.EACH_FLOAT32_SUM
    )
    assert np.isfinite(jax.jit(jax.hessian(loss))(x)).all()


@pytest.mark.full
@settings(max_examples=25)
@given(
    conv_size=st.sampled_from([2, 4, 7]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=10),
    ids=st.permutations(range(1, 11)),
    seed=st.integers(0, 99),
)
def test_any_segmentation_equals_the_oracle(conv_size, lengths, ids, seed):
    case = Case(length=40, conv_size=conv_size, batch=1, width=3, seed=seed)
    row = np.repeat(ids[: len(lengths)], lengths)[:40]
    case.ids = jnp.asarray(np.pad(row, (0, 40 - len(row)))[None], jnp.int32)
    compiled, sequential = _both(conv_size)
    arguments = (case.args, case.ids, case.cotangents)
    testing.assert_close(compiled(*arguments), sequential(*arguments), testing.FLOAT32_TOLERANCE)


@functools.cache
def _both(conv_size):
    """The value and gradients by xla and by the reference, compiled once."""

    def run(implementation, args, ids, cotangents):
        def op(x, weight, bias, initial_state):
            return causal_conv1d(
                x,
                weight,
                bias,
                activation="silu",
                initial_state=initial_state,
                segment_ids=ids,
                implementation=implementation,
            )

        outputs, pullback = jax.vjp(op, *args)
        return outputs, pullback(cotangents)

    return [jax.jit(functools.partial(run, name)) for name in ("xla", "reference")]


BAD = [
    ("x rank", {"x": ones((5, 3))}, r"x must be \(B, L, D\), got shape \(5, 3\)"),
    ("x empty", {"x": ones((2, 0, 3))}, "x must not be empty"),
    ("x dtype", {"x": ones((2, 5, 3), jnp.int32)}, "x must be float32 .* got int32"),
    ("weight rank", {"weight": ones((3,))}, r"weight must be \(W, D\)"),
    ("weight width", {"weight": ones((4, 2))}, r"weight must be \(W, D\) = \('any', 3\)"),
    ("weight empty", {"weight": ones((0, 3))}, "weight must have at least one tap"),
    ("weight dtype", {"weight": ones((4, 3), jnp.int32)}, "weight must be .* x is float32"),
    ("bias", {"bias": ones((4,))}, r"bias must be \(D,\) = \(3,\)"),
    ("bias dtype", {"bias": ones((3,), jnp.int32)}, "bias must be float32 or bfloat16"),
    ("activation", {"activation": "swish"}, "activation must be None or 'silu', got 'swish'"),
    (
        "state",
        {"initial_state": ones((2, 4, 3))},
        r"initial_state must be \(B, W-1, D\) = \(2, 3, 3\)",
    ),
    (
        "state dtype",
        {"initial_state": ones((2, 3, 3), jnp.bfloat16)},
        "initial_state must be float32 since x is float32, got bfloat16",
    ),
    ("ids shape", {"segment_ids": ones((2, 4), jnp.int32)}, r"segment_ids must be \(B, L\)"),
    ("ids dtype", {"segment_ids": ones((2, 5))}, "segment_ids must be int32"),
    ("ids value", {"segment_ids": -ones((2, 5), jnp.int32)}, "segment_ids must be >= 0"),
    ("name", {"implementation": "cuda"}, "choose among reference, xla, tpu, gpu"),
]


@pytest.mark.parametrize(("changed", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(changed, message):
    good = {"x": ones((2, 5, 3)), "weight": ones((4, 3))}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(good | changed))


def test_checked_finds_bad_ids_under_jit():
    x, weight = ones((2, 5, 3)), ones((4, 3))
    run = jax.jit(pallas_kernels.checked(causal_conv1d))
    error, (y, _) = run(x, weight, segment_ids=jnp.ones((2, 5), jnp.int32))
    error.throw()
    np.testing.assert_array_equal(y[0, :, 0], [1, 2, 3, 4, 4])
    error, _ = run(x, weight, segment_ids=jnp.array([[1, 0, 1, 1, 1]] * 2, jnp.int32))
    with pytest.raises(Exception, match=r"padding .* end of a row"):
        error.throw()


def test_sampled_positions_of_a_hundred_thousand_tokens():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 100_000, 2)).astype(np.float32)
    weight = rng.standard_normal((4, 2)).astype(np.float32)
    y, final = jax.jit(causal_conv1d)(x, weight)
    for t in (0, 1, 3, 4096, 65_535, 65_536, 99_999):
        window = np.pad(x[0], ((3, 0), (0, 0)))[t : t + 4]
        np.testing.assert_allclose(
            y[0, t], (window * weight).sum(0), **tolerances.EACH_FLOAT32_LAYERS
        )
    np.testing.assert_array_equal(final, x[:, -3:])
