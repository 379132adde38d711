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
from pallas_kernels import selective_scan
from pallas_kernels.selective_scan import xla
from pallas_kernels.selective_scan.shapes import Shape
from pallas_kernels.tools import testing
from pallas_kernels.tools.programs import program
from tests import tolerances
from tests.pallas_kernels.selective_scan.cases import NAMES, Case, assert_isolated
from tests.tiers import compiled_as_users


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


KINDS = list(itertools.product([False, True], repeat=3))  # full, packed, reverse
CASES = [(65, *kind) for kind in KINDS if sum(kind) % 2 == 0] + [
    (length, *KINDS[(3 * i + j) % 8])
    for i, length in enumerate([1, 2, 15, 63, 1000])
    for j in (0, 3)
]


@pytest.mark.full("1000-True-True-True", "65-False-True-True")
@pytest.mark.parametrize(
    ("length", "full", "packed", "reverse"),
    compiled_as_users(CASES, lambda length, *kind: length >= 65 and kind[-2]),
)
def test_xla_equals_the_oracle(length, full, packed, reverse):
    case = Case(length=length, full=full, packed=packed, reverse=reverse)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("packed", [False, True])
def test_a_few_rows_at_a_time(packed):
    states = 2 * 7 * 4
    assert xla.cut(5, 70, 7 * 4, states) == (5, 70, 3, 2, 2, 35)
    case = Case(length=70, batch=5, width=7, packed=packed)
    testing.assert_close(case.run("xla", tiles=states), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_xla_keeps_double_precision():
    with jax.enable_x64(True):
        case = Case(length=70, dtype="float64", packed=True)
        actual = case.run("xla")
        assert actual["outputs"][0].dtype == jnp.float64
        testing.assert_close(actual, case.run("reference"), testing.FLOAT64_TOLERANCE)


def test_the_oracle_is_the_recurrence():
    case = Case(length=9)
    x, dt, A, B, C, D, gate, bias, h = (np.asarray(case.args[n], np.float64) for n in NAMES)
    expected = []
    for t in range(9):
        step = np.log1p(np.exp(dt[:, t] + bias))
        h = np.exp(step[..., None] * A) * h + (step * x[:, t])[..., None] * B[:, t, None, :]
        y = (h * C[:, t, None, :]).sum(-1) + D * x[:, t]
        expected.append(y * gate[:, t] / (1 + np.exp(-gate[:, t])))
    y, final = case.run("reference")["outputs"]
    testing.assert_close(y, np.stack(expected, 1), testing.FLOAT32_TOLERANCE)
    testing.assert_close(final, h, testing.FLOAT32_TOLERANCE)


def test_bfloat16_against_the_float32_oracle():
    case = Case(length=100, dtype="bfloat16", packed=True)
    actual = case.run("xla")
    assert actual["outputs"][0].dtype == jnp.bfloat16
    assert actual["outputs"][1].dtype == jnp.float32
    assert {n: g.dtype.name for n, g in actual["gradients"].items()} == {
        n: case.args[n].dtype.name for n in NAMES
    }
    testing.assert_close(actual, case.oracle(), testing.BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_dtypes_may_differ_where_one_is_narrow(implementation):
    case = Case(length=20)
    narrow = case.args | {n: case.args[n].astype(jnp.bfloat16) for n in ("x", "B", "gate")}
    wide = case.args | {n: narrow[n].astype(jnp.float32) for n in ("x", "B", "gate")}
    case.cotangents = (case.cotangents[0].astype(jnp.bfloat16), case.cotangents[1])
    actual = case.run(implementation, args=narrow)
    case.cotangents = (case.cotangents[0].astype(jnp.float32), case.cotangents[1])
    testing.assert_close(actual, case.run("reference", args=wide), testing.BFLOAT16_TOLERANCE)


# What two documents share; every other argument is cut where they are.
SHARED = ("A", "D", "dt_bias", "initial_state")


@pytest.mark.always("xla-False")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_packed_equals_one_document_a_row(implementation, reverse):
    case = Case(length=60, packed=True, reverse=reverse, batch=1)
    ids = np.asarray(case.ids[0])
    y, final = case.run(implementation)["outputs"]
    real = int((ids != 0).sum())
    borders = [0, *(np.flatnonzero(np.diff(ids[:real])) + 1), real]
    documents = [slice(*pair) for pair in itertools.pairwise(borders)]
    first, last = (-1, 0) if reverse else (0, -1)
    for document in documents:
        args = {n: z if n in SHARED else z[:, document] for n, z in case.args.items()}
        if document != documents[first]:
            del args["initial_state"]
        alone, after = selective_scan(**args, **case.options, implementation="reference")
        testing.assert_close(y[:, document], alone, testing.FLOAT32_TOLERANCE)
        if document == documents[last]:
            testing.assert_close(final, after, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(y[:, real:], 0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_are_isolated_to_the_bit(implementation, reverse):
    case = Case(length=66, reverse=reverse)
    assert_isolated(functools.partial(case.run, implementation), case)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_padding_holds_is_never_seen(implementation):
    case = Case(length=20)
    ids = jnp.asarray(np.repeat([[1, 2, 0]], [8, 5, 7], axis=1).repeat(2, 0), jnp.int32)
    tokens = ("x", "dt", "B", "C", "gate")
    huge = {n: jnp.where((ids == 0)[..., None], 1e30, case.args[n]) for n in tokens}
    before = case.run(implementation, ids=ids)
    after = case.run(implementation, ids=ids, args=case.args | huge)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 20])
def test_a_row_of_padding_returns_its_initial_state(length, reverse):
    case = Case(length=length, reverse=reverse)
    result = case.run("xla", ids=jnp.zeros((2, length), jnp.int32))
    gradients = result["gradients"]
    np.testing.assert_array_equal(result["outputs"][0], 0)
    np.testing.assert_array_equal(result["outputs"][1], case.args["initial_state"])
    np.testing.assert_array_equal(gradients.pop("initial_state"), case.cotangents[1])
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("cuts", [[0, 7, 20, 33], list(range(34))], ids=["split", "steps"])
def test_whole_equals_split_equals_step_by_step(implementation, cuts):
    case = Case(length=33)
    run = jax.jit(functools.partial(selective_scan, **case.options, implementation=implementation))
    whole, final = run(**case.args)
    state, parts = case.args["initial_state"], []
    for start, stop in itertools.pairwise(cuts):
        args = {n: z if n in SHARED else z[:, start:stop] for n, z in case.args.items()}
        part, state = run(**args | {"initial_state": state})
        parts.append(part)
    testing.assert_close(jnp.concatenate(parts, 1), whole, testing.FLOAT32_TOLERANCE)
    testing.assert_close(state, final, testing.FLOAT32_TOLERANCE)


def test_a_decoding_step_has_no_loop():
    case = Case(length=1)
    step = jax.make_jaxpr(lambda args: selective_scan(**args, **case.options))(case.args)
    assert "scan" not in {e.primitive.name for e in equations(step.jaxpr)}


def test_reverse_is_flip_run_flip():
    case = Case(length=41)
    options = case.options | {"implementation": "xla"}
    y, final = selective_scan(**case.args, **options | {"reverse": True})
    flipped = {n: z if n in SHARED else z[:, ::-1] for n, z in case.args.items()}
    expected, last = selective_scan(**flipped, **options)
    testing.assert_close(y, expected[:, ::-1], testing.FLOAT32_TOLERANCE)
    testing.assert_close(final, last, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("reverse", [False, True])
def test_extreme_steps_and_decays(reverse):
    """dt from 1e-6 to 100 and A to -1e4: states that vanish at once, and ones that never do."""
    case = Case(length=200, full=False, reverse=reverse, width=16, states=9)
    rng = np.random.default_rng(1)
    shape = case.args["dt"].shape
    case.args |= {
        "dt": jnp.asarray(10 ** rng.uniform(-6, 2, shape), jnp.float32),
        "A": jnp.broadcast_to(-jnp.logspace(-4, 4, 9, dtype=jnp.float32), (16, 9)),
    }
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("dt", [-50.0, 0.0, 50.0])
def test_softplus_far_from_zero(dt):
    case = Case(length=20)
    case.args["dt"] = jnp.full_like(case.args["dt"], dt)
    testing.assert_close(case.run("xla"), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_the_same_call_twice_is_bitwise_equal():
    case = Case(length=129, packed=True)
    once, twice = case.run("xla"), case.run("xla")
    for old, new in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.full
def test_vmap_equals_folding_into_the_batch():
    case = Case(length=30, batch=6)
    shared = {n: case.args[n] for n in ("A", "D", "dt_bias")}
    rows = {n: z for n, z in case.args.items() if n not in shared}

    def loss(rows):
        y, final = selective_scan(**rows, **shared, **case.options)
        return jnp.sum(jnp.sin(y)) + jnp.sum(final * final)

    folded = jax.jit(jax.grad(loss))(rows)
    split = jax.tree.map(lambda z: z.reshape(3, 2, *z.shape[1:]), rows)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(split)
    mapped = jax.tree.map(lambda z, like: z.reshape(like.shape), mapped, folded)
    testing.assert_close(mapped, folded, testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_rows_on_several_devices_equal_rows_on_one():
    case = Case(length=30, batch=4, packed=True)
    shared = {n: case.args[n] for n in ("A", "D", "dt_bias")}
    rows = {n: z for n, z in case.args.items() if n not in shared}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    along, alike = jax.P("data"), jax.P()

    def loss(scan, rows, shared):
        y, final = scan(rows, shared, case.ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(final * final)

    def scan(rows, shared, ids):
        return selective_scan(**rows, **shared, segment_ids=ids, **case.options)

    sharded = jax.shard_map(
        scan, mesh=mesh, in_specs=(along, alike, along), out_specs=(along, along)
    )
    expected = jax.jit(jax.grad(functools.partial(loss, scan), (0, 1)))(rows, shared)
    actual = jax.jit(jax.grad(functools.partial(loss, sharded), (0, 1)))(rows, shared)
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


def test_second_order_and_forward_mode_through_the_reference():
    case = Case(length=3)

    def loss(x):
        args = case.args | {"x": x}
        return selective_scan(**args, **case.options, implementation="reference")[0].sum()

    x = case.args["x"]
    _, tangent = jax.jit(lambda x: jax.jvp(loss, (x,), (jnp.ones_like(x),)))(x)
    np.testing.assert_allclose(
        tangent, jax.jit(jax.grad(loss))(x).sum(), **tolerances.EACH_FLOAT32_TOTAL
    )
    assert np.isfinite(jax.jit(jax.hessian(loss))(x)).all()


def equations(jaxpr):
    """All equations, also those of inner programs, but not what is inside of a kernel."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


WIDE = Shape("wide", "here", 2, 512, 64, gated=True)
EXPANDED = 2 * 512 * 64 * 16


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
def test_no_array_is_as_large_as_the_states_of_all_tokens(implementation):
    scan = functools.partial(selective_scan, implementation=implementation)
    fn, operands = program(scan, WIDE, "forward+backward")
    found = list(equations(jax.make_jaxpr(fn)(*operands).jaxpr))
    assert len(found) > 100 or implementation == "gpu"
    largest = max(getattr(v.aval, "size", 0) for e in found for v in e.outvars)
    assert largest <= EXPANDED / 4


def test_memory_is_a_fraction_of_the_states_of_all_tokens():
    scan = functools.partial(selective_scan, implementation="xla")
    fn, operands = program(scan, WIDE, "forward+backward")
    memory = jax.jit(fn).lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * EXPANDED


def test_a_hundred_thousand_tokens():
    length = 100_000
    case = Case(length=length, batch=1, width=3, states=2, full=False)
    # A memory of a thousand tokens; the rounding of each is remembered as long.
    case.args["A"] = -jnp.asarray([[0.05, 1.0]] * 3, jnp.float32)
    y, final = jax.jit(functools.partial(selective_scan, implementation="xla"))(**case.args)
    x, dt, A, B, C, _, _, _, h = (
        None if case.args[n] is None else np.asarray(case.args[n], np.float64) for n in NAMES
    )
    sampled = {int(t) for t in np.random.default_rng(2).integers(0, length, 50)} | {length - 1}
    decay, written = np.exp(dt[0, :, :, None] * A), (dt * x)[0, :, :, None] * B[0, :, None]
    h, expected, actual = h[0], [], []
    for t in range(length):
        h = decay[t] * h + written[t]
        if t in sampled:
            expected.append(h @ C[0, t])
            actual.append(y[0, t])
    testing.assert_close(np.stack(actual), np.stack(expected), testing.FLOAT32_TOLERANCE)
    testing.assert_close(final[0], h, testing.FLOAT32_TOLERANCE)


@functools.cache
def double(implementation, reverse):
    """Outputs and gradients as a function of the arguments by name, segment ids and cotangents."""

    def op(args, ids):
        options = {"dt_softplus": True, "reverse": reverse, "implementation": implementation}
        return selective_scan(**args, segment_ids=ids, **options)

    def run(args, ids, cotangents):
        outputs, vjp = jax.vjp(lambda args: op(args, ids), args)
        return outputs, vjp(cotangents)

    return jax.jit(run)


@pytest.mark.full
@hypothesis.settings(max_examples=20)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    kind=st.sampled_from([(67, 5, 4, False), (9, 1, 3, True)]),
    seed=st.integers(0, 2**16),
)
def test_any_documents(lengths, kind, seed):
    length, width, states, reverse = kind
    ids = np.zeros((2, length), np.int32)
    ids[0] = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, length])[:length]
    ids[1] = np.repeat([*range(1, len(lengths) + 1), 9], [*lengths[::-1], length])[:length]
    with jax.enable_x64(True):
        case = Case(length=length, width=width, states=states, dtype="float64", seed=seed)
        actual, expected = (
            double(name, reverse)(case.args, jnp.asarray(ids), case.cotangents)
            for name in ("xla", "reference")
        )
        testing.assert_close(actual, expected, testing.FLOAT64_TOLERANCE)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


BAD = [
    ("x rank", {"x": zeros(5, 3)}, r"x must be \(B, L, D\), got shape \(5, 3\)"),
    ("x empty", {"x": zeros(2, 0, 3)}, "x and A must not be empty"),
    ("A empty", {"A": zeros(3, 0)}, "x and A must not be empty"),
    ("x dtype", {"x": zeros(2, 5, 3, dtype=np.int32)}, "x must be float32 .* got int32"),
    ("dt", {"dt": zeros(2, 5, 1)}, r"dt must be \(B, L, D\) = \(2, 5, 3\)"),
    ("dt dtype", {"dt": zeros(2, 5, 3, dtype=np.float16)}, "dt must be float32 or bfloat16"),
    ("A", {"A": zeros(4, 3)}, r"A must be \(D, N\) = \(3, 'any'\)"),
    ("A dtype", {"A": jnp.zeros((3, 4), jnp.bfloat16)}, "A must be float32 .* got bfloat16"),
    ("A value", {"A": zeros(3, 4) + 1}, r"A must be at most 0, got 1\.0"),
    ("A value, jax", {"A": jnp.ones((3, 4))}, r"A must be at most 0, got 1\.0"),
    ("B", {"B": zeros(2, 5, 3)}, r"B must be \(B, L, N\) = \(2, 5, 4\)"),
    ("C", {"C": zeros(2, 4, 4)}, r"C must be \(B, L, N\) = \(2, 5, 4\)"),
    ("D", {"D": zeros(4)}, r"D must be \(D,\) = \(3,\)"),
    ("D dtype", {"D": jnp.zeros(3, jnp.bfloat16)}, "D must be float32"),
    ("gate", {"gate": zeros(2, 5)}, r"gate must be \(B, L, D\) = \(2, 5, 3\)"),
    ("dt_bias", {"dt_bias": zeros(4)}, r"dt_bias must be \(D,\) = \(3,\)"),
    ("state", {"initial_state": zeros(2, 4, 3)}, r"initial_state must be .* = \(2, 3, 4\)"),
    (
        "state dtype",
        {"initial_state": jnp.zeros((2, 3, 4), jnp.bfloat16)},
        "initial_state must be float32 .* got bfloat16",
    ),
    ("ids shape", {"segment_ids": zeros(2, 4)}, r"segment_ids must be \(B, L\)"),
    ("ids dtype", {"segment_ids": zeros(2, 5)}, "segment_ids must be int32"),
    ("ids value", {"segment_ids": zeros(2, 5, dtype=np.int32) - 1}, "segment_ids must be >= 0"),
    ("name", {"implementation": "cuda"}, "choose among reference, xla, tpu, gpu"),
]


@pytest.mark.parametrize(("changed", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(changed, message):
    x, shared = zeros(2, 5, 3), zeros(2, 5, 4)
    good = {"x": x, "dt": x, "A": zeros(3, 4), "B": shared, "C": shared}
    with pytest.raises(ValueError, match=message):
        selective_scan(**(good | changed))


def test_a_gpu_refuses_what_it_cannot_address():
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x, shared = struct((64, 2**16, 512)), struct((64, 2**16, 16))
    args = (x, x, struct((512, 16)), shared, shared)
    choices = pallas_kernels.explain(selective_scan, *args)
    choices = {c.platform: c for c in choices if c.op == "selective_scan"}
    assert "an array has 4294967296 elements" in choices["cuda"].skipped["gpu"]
    assert choices["cuda"].implementation == "xla"


def test_checked_finds_bad_values_under_jit():
    args = Case(length=5).args
    run = jax.jit(pallas_kernels.checked(selective_scan))
    error, _ = run(**args, segment_ids=jnp.ones((2, 5), jnp.int32))
    error.throw()
    error, _ = run(**(args | {"A": -args["A"]}), segment_ids=jnp.ones((2, 5), jnp.int32))
    with pytest.raises(Exception, match="A must be at most 0"):
        error.throw()
    error, _ = run(**args, segment_ids=jnp.array([[1, 0, 1, 1, 1]] * 2, jnp.int32))
    with pytest.raises(Exception, match=r"padding .* end of a row"):
        error.throw()
