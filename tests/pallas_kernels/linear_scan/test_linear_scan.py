"""The op against its sequential oracle: every implementation, one body of tests."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import linear_scan
from pallas_kernels.tools import testing
from tests import tolerances
from tests.arrays import ones
from tests.pallas_kernels.linear_scan.cases import (
    COMPLEX,
    REAL,
    Case,
    assert_isolated,
)
from tests.tiers import compiled_as_users


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


KINDS = list(itertools.product([False, True], repeat=3))  # constant, packed, reverse
SHAPES = [(65, REAL, *kind) for kind in KINDS] + [
    (length, COMPLEX, *KINDS[(3 * i + j) % 8])
    for i, length in enumerate([1, 2, 15, 63, 1000])
    for j in (0, 3)
]


@pytest.mark.parametrize(
    ("length", "dtype", "constant", "packed", "reverse"),
    compiled_as_users(SHAPES, lambda length, *kind: length >= 65 and kind[-2]),
)
def test_xla_equals_the_oracle(length, dtype, constant, packed, reverse):
    case = Case(length=length, dtype=dtype, constant=constant, packed=packed, reverse=reverse)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("constant", [False, True], ids=["steps", "constant"])
def test_xla_keeps_double_precision(dtype, constant):
    with jax.enable_x64(True):
        case = Case(length=70, dtype=dtype, constant=constant, packed=True)
        actual = case.run("xla")
        assert actual["outputs"][0].dtype == dtype
        testing.assert_close(actual, case.run("reference"), testing.FLOAT64_TOLERANCE)


def test_the_oracle_is_the_recurrence():
    case = Case(length=9, packed=False)
    a, b, h = (np.asarray(x, np.float64) for x in case.args)
    expected = []
    for t in range(9):
        h = a[:, t] * h + b[:, t]
        expected.append(h)
    actual, final = case.run("reference")["outputs"]
    testing.assert_close(actual, np.stack(expected, 1), testing.FLOAT32_TOLERANCE)
    testing.assert_close(final, h, testing.FLOAT32_TOLERANCE)


def test_bfloat16_against_the_float32_oracle():
    case = Case(length=100, dtype="bfloat16", packed=True)
    actual = case.run("xla")
    assert actual["outputs"][0].dtype == jnp.bfloat16
    assert actual["outputs"][1].dtype == jnp.float32
    testing.assert_close(actual, case.oracle(), testing.BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_packed_equals_one_document_a_row(implementation, reverse):
    case = Case(length=60, packed=True, reverse=reverse, batch=1, dtype=COMPLEX)
    ids = np.asarray(case.ids[0])
    a, b, initial = case.args
    run = jax.jit(functools.partial(linear_scan, reverse=reverse, implementation=implementation))
    h, final = run(a, b, initial_state=initial, segment_ids=case.ids)
    real = int((ids != 0).sum())
    borders = [0, *(np.flatnonzero(np.diff(ids[:real])) + 1), real]
    documents = [slice(*pair) for pair in itertools.pairwise(borders)]
    first = documents[-1] if reverse else documents[0]
    run = jax.jit(functools.partial(linear_scan, reverse=reverse, implementation="reference"))
    for document in documents:
        state = initial if document == first else jnp.zeros_like(initial)
        alone, after = run(a[:, document], b[:, document], initial_state=state)
        testing.assert_close(h[:, document], alone, testing.FLOAT32_TOLERANCE)
        if document == (documents[0] if reverse else documents[-1]):
            testing.assert_close(final, after, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(h[:, real:], 0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_are_isolated_to_the_bit(implementation, reverse):
    case = Case(length=66, reverse=reverse)
    assert_isolated(functools.partial(case.run, implementation), case)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_row_of_padding_returns_its_initial_state(reverse):
    case = Case(length=20, reverse=reverse)
    ids = jnp.zeros((2, 20), jnp.int32)
    result = case.run("xla", ids=ids)
    np.testing.assert_array_equal(result["outputs"][0], 0)
    np.testing.assert_array_equal(result["outputs"][1], case.args[2])
    np.testing.assert_array_equal(result["gradients"][0], 0)
    np.testing.assert_array_equal(result["gradients"][1], 0)
    np.testing.assert_array_equal(result["gradients"][2], case.cotangents[1])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("cuts", [[0, 7, 20, 33], list(range(34))], ids=["split", "steps"])
def test_whole_equals_split_equals_step_by_step(implementation, cuts):
    a, b, initial = Case(length=33, dtype=COMPLEX).args
    run = jax.jit(functools.partial(linear_scan, implementation=implementation))
    whole, final = run(a, b, initial_state=initial)
    state, parts = initial, []
    for start, stop in itertools.pairwise(cuts):
        part, state = run(a[:, start:stop], b[:, start:stop], initial_state=state)
        parts.append(part)
    testing.assert_close(jnp.concatenate(parts, 1), whole, testing.FLOAT32_TOLERANCE)
    testing.assert_close(state, final, testing.FLOAT32_TOLERANCE)


def test_reverse_is_flip_run_flip():
    a, b, initial = Case(length=41).args
    backwards = jax.jit(functools.partial(linear_scan, reverse=True))
    h, final = backwards(a, b, initial_state=initial)
    flipped, last = jax.jit(linear_scan)(a[:, ::-1], b[:, ::-1], initial_state=initial)
    testing.assert_close(h, flipped[:, ::-1], testing.FLOAT32_TOLERANCE)
    testing.assert_close(final, last, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("decay", [0.0, 1e-30, 1.0, -1.0, 0.9999999])
def test_extreme_decays(decay):
    case = Case(length=300)
    case.args = (jnp.full_like(case.args[0], decay), *case.args[1:])
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_the_same_call_twice_is_bitwise_equal():
    case = Case(length=129, dtype=COMPLEX, packed=True)
    for x, y in zip(
        jax.tree.leaves(case.run("xla")), jax.tree.leaves(case.run("xla")), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_vmap_equals_folding_into_the_batch():
    a, b, initial = Case(length=30, batch=6).args

    def loss(a, b, initial):
        h, final = linear_scan(a, b, initial_state=initial)
        return jnp.sum(jnp.sin(h)) + jnp.sum(final * final)

    folded = jax.jit(jax.grad(loss, (0, 1, 2)))(a, b, initial)
    split = [x.reshape(3, 2, *x.shape[1:]) for x in (a, b, initial)]
    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*split)
    mapped = [x.reshape(y.shape) for x, y in zip(mapped, folded, strict=True)]
    testing.assert_close(mapped, list(folded), testing.FLOAT32_TOLERANCE)


def test_second_order_and_forward_mode_through_the_reference():
    a, b, initial = Case(length=6).args

    def loss(a):
        return linear_scan(a, b, initial_state=initial, implementation="reference")[0].sum()

    _, tangent = jax.jit(lambda a: jax.jvp(loss, (a,), (jnp.ones_like(a),)))(a)
    np.testing.assert_allclose(
        tangent, jax.jit(jax.grad(loss))(a).sum(), **tolerances.EACH_FLOAT32_SUM
    )
    assert np.isfinite(jax.jit(jax.hessian(loss))(a)).all()


BAD = [
    ("a", {"a": ones((2, 4, 3))}, r"a must be \(B, L, D\) or \(D,\) = \(2, 5, 3\)"),
    ("a width", {"a": ones((4,))}, r"a must be \(D,\) = \(3,\)"),
    ("b rank", {"b": ones((5, 3))}, r"b must be \(B, L, D\), got shape \(5, 3\)"),
    ("b empty", {"b": ones((2, 0, 3))}, "b must not be empty"),
    ("b dtype", {"b": ones((2, 5, 3), jnp.int32)}, "b must be float32 .* got int32"),
    ("mixed", {"a": ones((2, 5, 3), jnp.complex64)}, "a must be float32 .* since b is float32"),
    ("state", {"initial_state": ones((3, 3))}, r"initial_state must be \(B, D\) = \(2, 3\)"),
    (
        "state dtype",
        {"initial_state": ones((2, 3), jnp.bfloat16)},
        "initial_state must be float32, got bfloat16",
    ),
    ("ids shape", {"segment_ids": ones((2, 4), jnp.int32)}, r"segment_ids must be \(B, L\)"),
    ("ids dtype", {"segment_ids": ones((2, 5))}, "segment_ids must be int32"),
    ("ids value", {"segment_ids": -ones((2, 5), jnp.int32)}, "segment_ids must be >= 0"),
    ("name", {"implementation": "cuda"}, "choose among reference, xla, tpu, gpu"),
]


@pytest.mark.parametrize(("changed", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(changed, message):
    good = {"a": jnp.ones((2, 5, 3)), "b": jnp.ones((2, 5, 3))}
    with pytest.raises(ValueError, match=message):
        linear_scan(**(good | changed))


def test_checked_finds_bad_ids_under_jit():
    x = jnp.ones((2, 5, 3))
    run = jax.jit(pallas_kernels.checked(linear_scan))
    error, (h, _) = run(x, x, segment_ids=jnp.ones((2, 5), jnp.int32))
    error.throw()
    np.testing.assert_array_equal(h[0, :, 0], [1, 2, 3, 4, 5])
    error, _ = run(x, x, segment_ids=jnp.array([[1, 0, 1, 1, 1]] * 2, jnp.int32))
    with pytest.raises(Exception, match=r"padding .* end of a row"):
        error.throw()
