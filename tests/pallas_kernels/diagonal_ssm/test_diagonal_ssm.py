"""The op against its sequential oracle: every method and implementation, one body of tests."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

import pallas_kernels
from pallas_kernels import diagonal_ssm
from pallas_kernels.diagonal_ssm import chunked
from pallas_kernels.tools import testing
from tests import tolerances
from tests.arrays import ones
from tests.pallas_kernels.diagonal_ssm.cases import Case, assert_isolated
from tests.tiers import compiled_as_users, one_of_many

METHODS = ("fft", "chunked", "scan")
RECURRENT = ("chunked", "scan")


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


# Chunks are of 64 tokens: one, part of one, one and a bit, many.
KINDS = [
    (1, True, False),
    (2, False, True),
    (15, True, True),
    (63, False, True),
    (65, True, False),
    (130, True, True),
    (1000, False, False),
]


CASES = one_of_many(
    [(method, *kind) for method in METHODS for kind in KINDS],
    always=[
        *(("chunked", *kind) for kind in KINDS),
        *((method, *kind) for method in ("fft", "scan") for kind in (KINDS[0], KINDS[5])),
    ],
)


@pytest.mark.full(
    "fft-130-True-True",
    "chunked-1000-False-False",
    "scan-130-True-True",
    "chunked-65-True-False",
    "chunked-63-False-True",
)
@pytest.mark.parametrize(
    ("method", "length", "packed", "reverse"),
    compiled_as_users(CASES, lambda method, length, *kind: length >= 130),
)
def test_xla_equals_the_oracle(method, length, packed, reverse):
    packed = packed and method != "fft"
    case = Case(length=length, packed=packed, reverse=reverse, method=method)
    expected = oracle(length, packed, reverse)
    testing.assert_close(case.run("xla"), expected, testing.FLOAT32_TOLERANCE)


@functools.cache
def oracle(length, packed, reverse):
    return Case(length=length, packed=packed, reverse=reverse).oracle()


@pytest.mark.always("scan")
@pytest.mark.parametrize("method", METHODS)
def test_xla_keeps_double_precision(method):
    with jax.enable_x64(True):
        case = Case(length=70, dtype="float64", packed=method != "fft", method=method)
        actual = case.run("xla")
        assert [x.dtype.name for x in actual["outputs"]] == ["float64", "complex128"]
        testing.assert_close(actual, case.run("reference"), testing.FLOAT64_TOLERANCE)


def test_the_oracle_is_the_recurrence():
    case = Case(length=9)
    u, log_a, c, h = (np.asarray(x).astype(complex) for x in case.args)
    expected = []
    for t in range(9):
        h = np.exp(log_a) * h + u[:, t, :, None]
        expected.append(2 * (c * h).real.sum(-1))
    y, final = case.run("reference")["outputs"]
    testing.assert_close(y, np.stack(expected, 1), testing.FLOAT32_TOLERANCE)
    testing.assert_close(final, h, testing.FLOAT32_TOLERANCE)


@pytest.mark.always("chunked")
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_against_the_float32_oracle(method):
    case = Case(length=100, dtype="bfloat16", method=method)
    case.args = (case.args[0], *Case(length=100).args[1:])
    case.cotangents = (case.cotangents[0], Case(length=100).cotangents[1])
    actual = case.run("xla")
    assert [x.dtype.name for x in actual["outputs"]] == ["bfloat16", "complex64"]
    testing.assert_close(actual, case.oracle(), testing.BFLOAT16_TOLERANCE)


@pytest.mark.always("scan-False")
@pytest.mark.parametrize(("method", "reverse"), [("chunked", True), ("scan", False)])
def test_packed_equals_one_document_a_row(method, reverse):
    case = Case(length=75, packed=True, reverse=reverse, batch=1)
    ids = np.asarray(case.ids[0])
    u, log_a, c, initial = jax.device_get(case.args)
    run = functools.partial(diagonal_ssm, reverse=reverse, method=method, implementation="xla")
    y, final = jax.device_get(
        jax.jit(run)(u, log_a, c, initial_state=initial, segment_ids=case.ids)
    )
    by_itself = functools.partial(diagonal_ssm, reverse=reverse, implementation="reference")
    real = int((ids != 0).sum())
    borders = [0, *(np.flatnonzero(np.diff(ids[:real])) + 1), real]
    documents = [slice(*pair) for pair in itertools.pairwise(borders)]
    first = documents[-1] if reverse else documents[0]
    for document in documents:
        entering = initial if document == first else None
        alone, after = jax.jit(by_itself)(u[:, document], log_a, c, initial_state=entering)
        testing.assert_close(y[:, document], alone, testing.FLOAT32_TOLERANCE)
        if document == (documents[0] if reverse else documents[-1]):
            testing.assert_close(final, after, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(y[:, real:], 0)


@pytest.mark.parametrize(
    ("method", "reverse"), [("chunked", True), ("scan", False), ("reference", False)]
)
def test_documents_are_isolated_to_the_bit(method, reverse):
    name = "reference" if method == "reference" else "xla"
    case = Case(length=150, reverse=reverse, method=None if name == method else method)
    assert_isolated(functools.partial(case.run, name), case)


@pytest.mark.always("chunked-False")
@pytest.mark.parametrize(("method", "reverse"), [("fft", True), ("chunked", False), ("scan", True)])
def test_one_document_and_padding(method, reverse):
    """All methods take it, the FFT where the ids are known; a row may be all padding."""
    case = Case(length=70, reverse=reverse, batch=3, method=method)
    ids = np.zeros((3, 70), np.int32)
    ids[0, :41], ids[1, :] = 5, 1
    result = case.run("xla", ids=ids)
    case.ids = jnp.asarray(ids)
    testing.assert_close(result, case.oracle(), testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(result["outputs"][0][2], 0)
    np.testing.assert_array_equal(result["outputs"][1][2], case.args[3][2])
    np.testing.assert_array_equal(result["gradients"][0][2], 0)
    np.testing.assert_array_equal(result["gradients"][3][2], case.cotangents[1][2])


@pytest.mark.full("split-fft", "split-scan", "steps-fft")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cuts", [[0, 7, 20, 33], list(range(34))], ids=["split", "steps"])
def test_whole_equals_split_equals_step_by_step(method, cuts):
    u, log_a, c, initial = Case(length=33).args
    run = jax.jit(functools.partial(diagonal_ssm, method=method))
    whole, final = run(u, log_a, c, initial_state=initial)
    state, parts = initial, []
    for start, stop in itertools.pairwise(cuts):
        part, state = run(u[:, start:stop], log_a, c, initial_state=state)
        parts.append(part)
    testing.assert_close(jnp.concatenate(parts, 1), whole, testing.FLOAT32_TOLERANCE)
    testing.assert_close(state, final, testing.FLOAT32_TOLERANCE)


@pytest.mark.full("fft")
@pytest.mark.parametrize("method", METHODS)
def test_reverse_is_flip_run_flip(method):
    u, log_a, c, initial = Case(length=41).args
    run = functools.partial(diagonal_ssm, method=method, initial_state=initial)
    y, final = jax.jit(functools.partial(run, reverse=True))(u, log_a, c)
    flipped, last = jax.jit(run)(np.flip(u, 1), log_a, c)
    testing.assert_close(y, np.flip(flipped, 1), testing.FLOAT32_TOLERANCE)
    testing.assert_close(final, last, testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.optimised
@pytest.mark.parametrize("method", METHODS)
def test_extreme_decays(method):
    """No memory at all, no forgetting, phases of thousands of turns, each in its own channel."""
    case = Case(length=300, width=5, states=1, method=method)
    log_a = jnp.array([-1e4 + 1j, -1e-3, -1e-30 + 3.1j, -0.1 + 1e4j, -1.0], jnp.complex64)
    case.args = (case.args[0], log_a[:, None], *case.args[2:])
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.always("scan-700-decay2")
@pytest.mark.optimised
@pytest.mark.parametrize(
    ("method", "length", "decay"),
    [
        ("chunked", 2000, (5e-4, 2e-3)),
        ("fft", 2000, (5e-4, 2e-3)),
        ("scan", 700, (1e-2, 4e-2)),
    ],
)
def test_long_memory(method, length, decay):
    """The slowest modes that S4D starts from; a twentieth of their memory for the scan, which
    rounds at every step (see the op's docstring)."""
    case = Case(length=length, width=2, method=method, decay=decay)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("method", ["chunked", "fft"])
def test_sampled_positions_of_a_hundred_thousand_tokens(method):
    length = 100_000
    u, log_a, c, _ = Case(length=length, batch=1, width=2, states=2, decay=(1e-5, 1e-3)).args
    y, final = jax.jit(functools.partial(diagonal_ssm, method=method))(u, log_a, c)
    exact = [np.asarray(x).astype(np.complex128) for x in (u[0], log_a, c)]
    powers = np.exp(exact[1][..., None] * np.arange(length))
    kernel = 2 * (exact[2][..., None] * powers).real.sum(1)  # (H, L)
    samples = [0, 1, 63, 64, 4095, 50_001, 99_936, 99_999]
    expected = [[kernel[h, : t + 1] @ exact[0][t::-1, h].real for h in range(2)] for t in samples]
    testing.assert_close(y[0, np.array(samples)], np.array(expected), testing.FLOAT32_TOLERANCE)
    state = np.einsum("hnl,lh->hn", powers[..., ::-1], exact[0])
    testing.assert_close(final[0], state, testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@hypothesis.given(
    length=strategies.sampled_from([70]),
    method=strategies.sampled_from(RECURRENT),
    documents=strategies.lists(strategies.integers(1, 70), min_size=1, max_size=5),
    padding=strategies.integers(0, 7),
    reverse=strategies.booleans(),
    seed=strategies.integers(0, 3),
)
@hypothesis.settings(max_examples=12)
def test_any_segmentation(length, method, documents, padding, reverse, seed):
    u, log_a, c, initial = Case(length=length, seed=seed).args
    row = np.repeat(np.arange(len(documents)) % 2 + 1, documents)[: length - padding]
    ids = np.zeros((2, length), np.int32)
    ids[0, : len(row)] = row
    ids[1, : length - padding] = 1
    run = functools.partial(_run, reverse=reverse)
    actual = run("xla", method)(u, log_a, c, initial, ids)
    expected = run("reference", None)(u, log_a, c, initial, ids)
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


@functools.cache
def _run(implementation, method, *, reverse):
    return jax.jit(
        lambda u, log_a, c, initial, ids: diagonal_ssm(
            u,
            log_a,
            c,
            initial_state=initial,
            segment_ids=ids,
            reverse=reverse,
            method=method,
            implementation=implementation,
        )
    )


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_twice_is_bitwise_equal(method):
    case = Case(length=129, packed=method != "fft", method=method)
    once, twice = case.run("xla"), case.run("xla")
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.full
@pytest.mark.parametrize("method", one_of_many(METHODS, ["chunked"]))
def test_vmap_equals_folding_into_the_batch(method):
    case = Case(length=70, batch=6, packed=method != "fft")
    u, log_a, c, initial = case.args

    def loss(u, log_a, c, initial, ids):
        y, final = diagonal_ssm(u, log_a, c, initial_state=initial, segment_ids=ids, method=method)
        return jnp.sum(jnp.sin(y)) + jnp.sum((final * final).real)

    def mean_gradients(u, initial, ids):
        return jax.grad(loss, (0, 1, 2, 3))(u, log_a, c, initial, ids)

    folded = jax.jit(mean_gradients)(u, initial, case.ids)
    rows = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), (u, initial, case.ids))
    du, dlog_a, dc, dinitial = jax.jit(jax.vmap(mean_gradients))(*rows)
    mapped = (du.reshape(u.shape), dlog_a.sum(0), dc.sum(0), dinitial.reshape(initial.shape))
    testing.assert_close(mapped, folded, testing.FLOAT32_TOLERANCE)


def test_second_order_and_forward_mode_through_the_reference():
    u, log_a, c, _ = Case(length=6).args

    def loss(u):
        return jnp.sum(jnp.square(diagonal_ssm(u, log_a, c, implementation="reference")[0]))

    _, tangent = jax.jit(lambda u: jax.jvp(loss, (u,), (jnp.ones_like(u),)))(u)
    np.testing.assert_allclose(
        tangent, jax.jit(jax.grad(loss))(u).sum(), **tolerances.EACH_FLOAT32_TOTAL
    )
    hessian = np.asarray(jax.jit(jax.hessian(loss))(u)).reshape(u.size, u.size)
    np.testing.assert_allclose(hessian, hessian.T, **tolerances.EACH_FLOAT32_SECOND)
    assert np.abs(hessian).max() > 1


BAD = [
    ("u rank", {"u": jnp.ones((5, 3))}, r"u must be \(B, L, H\), got shape \(5, 3\)"),
    ("u empty", {"u": jnp.ones((2, 0, 3))}, "u must not be empty"),
    ("u dtype", {"u": ones((2, 5, 3), jnp.int32)}, "u must be float32 .* got int32"),
    ("log_a", {"log_a": ones((2, 4), jnp.complex64)}, r"log_a must be \(H, N\) = \(3, 'any'\)"),
    ("no state", {"log_a": ones((3, 0), jnp.complex64)}, "log_a must have at least one state"),
    ("log_a dtype", {"log_a": -ones((3, 4))}, "log_a must be complex64 since u is float32"),
    ("growing", {"log_a": ones((3, 4), jnp.complex64)}, "log_a's real part must be at most 0"),
    ("c", {"c": ones((3, 5), jnp.complex64)}, r"c must be \(H, N\) = \(3, 4\)"),
    ("c dtype", {"c": ones((3, 4))}, "c must be complex64 since u is float32, got float32"),
    (
        "state",
        {"initial_state": ones((2, 3), jnp.complex64)},
        r"initial_state must be \(B, H, N\) = \(2, 3, 4\)",
    ),
    (
        "state dtype",
        {"initial_state": ones((2, 3, 4))},
        "initial_state must be complex64, got float32",
    ),
    ("ids shape", {"segment_ids": ones((2, 4), jnp.int32)}, r"segment_ids must be \(B, L\)"),
    ("ids dtype", {"segment_ids": ones((2, 5))}, "segment_ids must be int32"),
    ("ids value", {"segment_ids": -ones((2, 5), jnp.int32)}, "segment_ids must be >= 0"),
    ("method", {"method": "dft"}, "method='dft'; choose among fft, chunked, scan"),
    ("name", {"implementation": "cuda"}, "choose among reference, xla, tpu, gpu"),
]
GOOD = {
    "u": ones((2, 5, 3)),
    "log_a": -ones((3, 4), jnp.complex64),
    "c": ones((3, 4), jnp.complex64),
}


@pytest.mark.parametrize(("changed", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        diagonal_ssm(**(GOOD | changed))


def test_a_forced_fft_refuses_what_it_cannot_serve():
    several = np.array([[1, 1, 2, 2, 0]] * 2, np.int32)
    with pytest.raises(NotImplementedError, match="does not stop at documents"):
        diagonal_ssm(**GOOD, segment_ids=several, method="fft")
    one = jnp.ones((2, 5), jnp.int32)
    with pytest.raises(NotImplementedError, match="not known under jit"):
        jax.jit(lambda ids: diagonal_ssm(**GOOD, segment_ids=ids, method="fft"))(one)
    long = jax.ShapeDtypeStruct((1, 2**17, 3), jnp.float32)
    with pytest.raises(NotImplementedError, match="below a length of 131072"):
        jax.eval_shape(lambda u: diagonal_ssm(u, GOOD["log_a"], GOOD["c"], method="fft"), long)


def test_kernels_refuse_with_a_reason():
    with pytest.raises(NotImplementedError, match="its kernel is a scan"):
        diagonal_ssm(**GOOD, method="chunked", implementation="tpu")
    wide = {name: jnp.ones((3, 4096), jnp.complex64) for name in ("log_a", "c")}
    wide["log_a"] = -wide["log_a"]
    for name, message in (
        ("tpu", "4096 states a channel take"),
        ("gpu", "do not fit in registers"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            diagonal_ssm(**(GOOD | wide), implementation=name)
    with jax.enable_x64(True):
        double = {
            "u": jnp.ones((2, 5, 3), jnp.float64),
            "log_a": -jnp.ones((3, 4), jnp.complex128),
            "c": jnp.ones((3, 4), jnp.complex128),
        }
        for name in ("tpu", "gpu"):
            with pytest.raises(NotImplementedError, match="no float64; reference and xla do"):
                diagonal_ssm(**double, implementation=name)


def _choices(**options):
    struct = {
        "u": jax.ShapeDtypeStruct((2, 5, 3), jnp.float32),
        "log_a": jax.ShapeDtypeStruct((3, 4), jnp.complex64),
        "c": jax.ShapeDtypeStruct((3, 4), jnp.complex64),
    }
    choices = pallas_kernels.explain(diagonal_ssm, **struct, **options)
    return {c.platform: c for c in choices if c.op == "diagonal_ssm"}


def test_explain_says_what_runs_where():
    names = {p: c.implementation for p, c in _choices(reverse=True).items()}
    assert names == {"cpu": "xla", "tpu": "tpu", "cuda": "gpu", "rocm": "xla"}
    chosen = _choices(method="chunked")
    assert {c.implementation for c in chosen.values()} == {"xla"}
    assert "not tpu: its kernel is a scan, method='chunked' is xla's" in str(chosen["tpu"])


def test_checked_finds_bad_values_under_jit():
    run = jax.jit(pallas_kernels.checked(diagonal_ssm))
    error, (y, _) = run(**GOOD, segment_ids=jnp.ones((2, 5), jnp.int32))
    error.throw()
    np.testing.assert_allclose(y[0, 0], 8, **tolerances.EACH_FLOAT32_TERMS)
    growing = {"log_a": jnp.ones((3, 4), jnp.complex64)}
    error, _ = run(**(GOOD | growing), segment_ids=jnp.ones((2, 5), jnp.int32))
    with pytest.raises(Exception, match="log_a must be at most 0"):
        error.throw()
    error, _ = run(**GOOD, segment_ids=jnp.array([[1, 0, 1, 1, 1]] * 2, jnp.int32))
    with pytest.raises(Exception, match=r"padding .* end of a row"):
        error.throw()


def test_documents_of_a_chunk():
    segment_index = jnp.array([[1, 1, 2, 2, 2, 3, 3, 0, 0]], jnp.int32)
    cut = jax.jit(chunked.documents, static_argnums=1)(segment_index, 3)
    np.testing.assert_array_equal(cut.place, [[[0, 0, 1], [0, 0, 1], [0, -1, -1]]])
    np.testing.assert_array_equal(cut.first, [[[1, 1, 0], [1, 1, 0], [1, 0, 0]]])
    np.testing.assert_array_equal(cut.last, [[[0, 0, 1], [0, 0, 1], [1, 0, 0]]])
    np.testing.assert_array_equal(cut.keep, [[False, False, True]])
    np.testing.assert_array_equal(cut.lengths, [7])
