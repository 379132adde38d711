"""The recurrence with its projections: in blocks, as two scans, and token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bidirectional_mimo_scan
from pallas_kernels.bidirectional_mimo_scan import blocks, xla
from pallas_kernels.tools import testing
from seqmodels import ops
from seqmodels.segments import Segments
from tests.arrays import ones
from tests.tiers import one_of_many

WIDTH, STATES = 3, 4
PORTABLE = functools.partial(bidirectional_mimo_scan, implementation="xla")
IDS = np.array([[1] * 15 + [2] * 20 + [0] * 5, [1] * 40], np.int32)


def arguments(batch, length):
    rng = np.random.default_rng(length)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    decay = np.exp(rng.uniform(-0.5, -1e-3, STATES) + 1j * rng.uniform(0, 3, STATES))
    u, into, out = (
        normal(batch, length, WIDTH), normal(WIDTH, 2 * STATES), normal(4 * STATES, WIDTH)
    )  # fmt: skip
    return u, jnp.asarray(decay, jnp.complex64), into, out


def in_blocks(*args):
    return blocks.BACKEND(None, *args, None)[0]


def wanted(args, cotangent, segment_ids=None):
    """Token by token in double precision, with all gradients."""
    with jax.enable_x64(True):
        run = testing.oracle(bidirectional_mimo_scan, implementation="reference")
        data = {} if segment_ids is None else {"segment_ids": segment_ids}
        found = run(testing.doubled(args), data, testing.doubled(cotangent))
        return jax.tree.map(np.asarray, found)


def cotangent_of(u):
    return jnp.cos(jnp.arange(u.size, dtype=jnp.float32)).reshape(u.shape)


@pytest.mark.always("1-1", "3-300")
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 63), (3, 300), (20, 260)])
def test_blocks_and_scans_equal_one_token_at_a_time(batch, length):
    args = arguments(batch, length)
    cotangent = cotangent_of(args[0])
    expected = wanted(args, cotangent)
    for op in (in_blocks, PORTABLE):
        with jax.numpy_dtype_promotion("strict"):
            actual = testing.program(op)(args, {}, cotangent)
        testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


def test_several_documents_a_row():
    args = arguments(*IDS.shape)
    cotangent = cotangent_of(args[0])
    actual = testing.program(PORTABLE)(args, {"segment_ids": IDS}, cotangent)
    testing.assert_close(actual, wanted(args, cotangent, IDS), testing.FLOAT32_TOLERANCE)
    assert (np.asarray(actual["outputs"])[IDS == 0] == 0).all()
    assert (np.asarray(actual["gradients"][0])[IDS == 0] == 0).all()


@pytest.mark.full
@pytest.mark.parametrize("implementation", one_of_many(["tpu", "gpu"], ["gpu"]))
def test_the_kernels_of_the_linear_scan_between_products(implementation):
    args = arguments(*IDS.shape)
    cotangent = cotangent_of(args[0])
    with testing.interpret():
        run = testing.program(bidirectional_mimo_scan, implementation=implementation)
        actual = jax.device_get(run(args, {"segment_ids": IDS}, cotangent))
    testing.assert_close(actual, wanted(args, cotangent, IDS), testing.FLOAT32_TOLERANCE)


def test_a_row_of_one_document_ends_where_its_padding_begins():
    """Through `ops`, where such rows need no resets."""
    u, *shared = arguments(2, 40)
    both = jax.jit(ops.bidirectional_mimo_scan)
    ids = jnp.asarray([[1] * 15 + [0] * 25, [1] * 40], jnp.int32)
    alone = both(u[:1, :15], *shared)
    padded = both(u, *shared, segments=Segments.from_ids(ids, single=True))
    testing.assert_close(padded[:1, :15], alone, testing.FLOAT32_TOLERANCE)


def test_a_cpu_takes_blocks_where_states_are_many(monkeypatch):
    args = arguments(2, 300)
    expected = jax.jit(in_blocks)(*args)
    monkeypatch.setattr(xla, "_LARGE", 2 * 300 * STATES)
    np.testing.assert_array_equal(jax.jit(lambda *a: PORTABLE(*a))(*args), expected)
    monkeypatch.setattr(xla, "_LARGE", 2 * 300 * STATES + 1)
    scanned = jax.jit(lambda *a: PORTABLE(*a))(*args)
    np.testing.assert_array_equal(
        scanned, jax.jit(lambda *a: xla._METHODS["scans"](None, *a, None)[0])(*args)
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"u": ones((2, 3))}, r"u must be \(B, L, H\)"),
        ({"u": ones((1, 5, 3), "bfloat16")}, "u must be float32 or float64, got bfloat16"),
        ({"decay": ones(4)}, "decay must be complex64 since u is float32, got float32"),
        ({"input_projection": ones((3, 4))}, r"input_projection must be .* = \(3, 8\)"),
        ({"output_projection": ones((8, 3))}, r"output_projection must be .* = \(16, 3\)"),
        ({"segment_ids": ones((1, 4), jnp.int32)}, r"segment_ids must be .* = \(1, 5\)"),
    ],
)
def test_bad_input_is_named(changed, message):
    names = ("u", "decay", "input_projection", "output_projection")
    given = dict(zip(names, arguments(1, 5), strict=True)) | changed
    with pytest.raises(ValueError, match=message):
        bidirectional_mimo_scan(**given)
