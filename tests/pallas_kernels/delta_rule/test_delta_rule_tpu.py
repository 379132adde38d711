"""The TPU kernels: interpreted on the host, and their inverse in numpy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import compat, segments
from pallas_kernels.delta_rule import tpu, tpu_inverse
from pallas_kernels.delta_rule.shapes import SHAPES
from pallas_kernels.matrix_state import tpu as matrix_tpu
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.matrix_state.tpu import KernelShape, Limits, Tiles, choose_tiles, vmem_bytes
from pallas_kernels.tools import testing
from tests import tolerances
from tests.pallas_kernels.delta_rule.cases import Case, assert_isolated, normalised
from tests.tiers import one_of_many

CHUNK = 16
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
CHIPS = {
    "v5e": compat.tpu.ChipVersion.TPU_V5E,
    "v5p": compat.tpu.ChipVersion.TPU_V5P,
    "v6e": compat.tpu.ChipVersion.TPU_V6E,
    "tpu7x": compat.tpu.ChipVersion.TPU_7X,
}


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


# Three chunks, of two blocks each, and two blocks of heads, where there are 37 tokens and two or
# more heads.
SMALL, ANY = Limits(heads=1, heads_vector_decay=1, solve_block=CHUNK // 2), Limits()


@functools.partial(jax.jit, static_argnames="config")
def _value_and_gradients(args, ids, cotangents, config):
    def op(args):
        given = [args.get(name) for name in NAMES]
        return tpu.BACKEND(config, *given, None if ids is None else segments.index(ids))

    outputs, pullback = jax.vjp(op, args)
    return {"outputs": outputs, "gradients": pullback(cotangents)[0]}


def interpreted(case, limits=SMALL, args=None, ids=None):
    """What `Case.run` gives, in chunks of `CHUNK` tokens."""
    args, ids = args or case.args, case.ids if ids is None else ids
    config = Config(args["q"].shape[3] ** -0.5, CHUNK, limits)
    with testing.interpret():
        result = _value_and_gradients(args, ids, case.cotangents, config)
        return jax.tree.map(np.asarray, result)


def one_head(**options):
    return Case(**({"length": 37, "batch": 1, "heads": 1, "groups": 1} | options))


# Each feature with each other at least once, not the full product: interpretation is slow.
FEATURES = {
    "groups-in-parts": {"decay": "head", "packed": True, "heads": 4, "batch": 1},
    "alone": {"decay": "head", "heads": 2, "batch": 2},
    "plain-packed": {"decay": None, "packed": True, "groups": 1, "heads": 2, "batch": 2},
    "key-packed": {"decay": "key", "packed": True, "heads": 2, "batch": 2},
    "key-grouped": {"decay": "key", "groups": 1, "heads": 2, "batch": 1, "length": 48},
}


@pytest.mark.always("key-packed")
@pytest.mark.parametrize("name", FEATURES)
def test_kernels_equal_the_oracle(name):
    case = Case(**({"length": 37} | FEATURES[name]))
    testing.assert_close(interpreted(case), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_several_groups_in_one_step():
    case = Case(length=1, batch=1, packed=True)
    testing.assert_close(interpreted(case, ANY), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("decay", one_of_many(["head", "key"], ["head"]))
def test_bfloat16_against_the_float32_oracle(decay):
    case = one_head(length=64, decay=decay, dtype="bfloat16", packed=True, size=(32, 16))
    actual, expected = interpreted(case), case.oracle()
    assert actual["outputs"][0].dtype == jnp.bfloat16
    assert actual["outputs"][1].dtype == np.float32
    assert actual["gradients"]["log_decay"].dtype == np.float32
    assert actual["gradients"]["beta"].dtype == jnp.bfloat16
    testing.assert_close(actual["outputs"], expected["outputs"], tolerances.BFLOAT16)
    testing.assert_close(actual["gradients"], expected["gradients"], tolerances.BFLOAT16_GRADIENTS)


@pytest.mark.parametrize("decay", one_of_many(["head", "key"], ["key"]))
def test_documents_are_isolated_to_the_bit(decay):
    case = one_head(decay=decay)
    assert_isolated(functools.partial(interpreted, case), case)


@pytest.mark.full
@pytest.mark.parametrize("decay", one_of_many(["head", "key"], ["head"]))
def test_extreme_decays(decay):
    """Decays of 1 and 0 beside ordinary ones; gradients of clamped ones are 0."""
    case = one_head(length=40, decay=decay)
    g = np.array(case.args["log_decay"])
    g[:, 3::7], g[:, 5::7], g[:, 20:30] = 0.0, -1e30, -103.0
    case.args["log_decay"] = jnp.asarray(g)
    actual, expected = interpreted(case), case.oracle()
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(actual["gradients"]["log_decay"][:, 5::7], 0)


@functools.partial(jax.jit, static_argnames="limits")
def _run(args, ids, limits=ANY):
    segment_index = segments.index(ids)
    return tpu.BACKEND(
        Config(8**-0.5, CHUNK, limits), *(args[name] for name in NAMES), segment_index
    )


def test_the_same_call_twice_is_bitwise_equal():
    case = one_head(packed=True)
    with testing.interpret():
        once, twice = (jax.tree.map(np.asarray, _run(case.args, case.ids)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, twice)


@pytest.mark.full
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), padding=st.integers(0, 20)
)
def test_any_segmentation(lengths, padding):
    case = one_head()
    ids = np.repeat(np.arange(len(lengths)) + 1, lengths)[: 37 - padding]
    case.ids = jnp.asarray(np.pad(ids, (0, 37 - len(ids)))[None], jnp.int32)
    with testing.interpret():
        actual = jax.tree.map(np.asarray, _run(case.args, case.ids))
    testing.assert_close(actual, case.oracle()["outputs"], testing.FLOAT32_TOLERANCE)


def test_one_token_needs_no_kernel():
    case = Case(length=1)
    expected = case.oracle()
    testing.assert_close(case.run(None), expected, testing.FLOAT32_TOLERANCE)


def broken_carry_not_reset(monkeypatch):
    monkeypatch.setattr(matrix_tpu, "sequence_begins", lambda: compat.pl.program_id(0) < 0)


def broken_carry_shifted_by_one(monkeypatch):
    own = matrix_tpu.own

    def shifted(dims):
        heads = dims.steps_per_group * dims.tiles.heads
        start = jax.lax.rem(own(dims).start + 1, heads)
        return compat.pl.ds(start, dims.tiles.heads)

    monkeypatch.setattr(matrix_tpu, "own", shifted)


@pytest.mark.always("broken_carry_not_reset")
@pytest.mark.parametrize("mutant", [broken_carry_not_reset, broken_carry_shifted_by_one])
def test_mutants_are_caught(mutant, monkeypatch):
    case = Case(length=37, batch=2, groups=1, heads=2)
    expected = case.oracle()["outputs"]
    mutant(monkeypatch)
    ids = jnp.ones((2, 37), jnp.int32)
    with testing.interpret():
        # A function of its own, so that nothing traced before is found again.
        outputs = jax.jit(lambda *args: _run.__wrapped__(*args, SMALL))(case.args, ids)
        outputs = jax.tree.map(np.asarray, outputs)
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(outputs, expected, testing.FLOAT32_TOLERANCE)


# The inverse.


@functools.partial(jax.jit, static_argnums=1)
def inverse(lower, block):
    blocks = tpu_inverse.diagonal(lower, block)[None]
    return tpu_inverse.merged(tpu_inverse.substituted(blocks, False)[0], lower, False)


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("kind", ["random", "ones"])
def test_inverse(kind, size):
    """Also where its power series has terms of 1e18 that cancel to 1."""
    keys = normalised(np.random.default_rng(0).standard_normal((size, 8)))
    lower = np.tril(keys @ keys.T if kind == "random" else np.ones((size, size)), -1)
    expected = np.linalg.inv(np.eye(size) + lower)
    lower = jnp.asarray(lower, jnp.float32)
    for block in (8, 16):
        actual = inverse(lower, min(block, size))
        testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


def test_inverse_of_documents_that_overflow():
    """Rows of the others are the same to the bit; the first broken one is seen."""
    document = np.repeat([1, 2, 3], [5, 6, 5])
    keys = normalised(np.random.default_rng(0).standard_normal((16, 8)))
    lower = np.where(document[:, None] == document, np.tril(keys @ keys.T, -1), 0)
    broken = lower.copy()
    broken[7, 6], broken[10, 9] = np.inf, 1e38

    def inverse(lower):
        blocks = tpu_inverse.diagonal(lower, 8)[None]
        return tpu_inverse.merged(tpu_inverse.substituted(blocks, True)[0], lower, True)

    before, after = (
        np.asarray(jax.jit(inverse)(jnp.asarray(x, jnp.float32))) for x in (lower, broken)
    )
    others = document != 2
    np.testing.assert_array_equal(after[others], before[others])
    assert not np.isfinite(after[7, 6])


# Memory.


def kernel_shape(shape):
    keys, values = (-(-size // 128) * 128 for size in (shape.key_size, shape.value_size))
    length = -(-shape.length // 128) * 128
    sizes = (shape.batch, length, shape.groups, shape.heads, keys, values)
    return KernelShape(*sizes, shape.decay, True, 1.0, jnp.dtype(shape.dtype), Tiles(128, 1))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_tiles_fit_every_generation(chip, name):
    dims = kernel_shape(SHAPES[name])
    tiles = choose_tiles(tpu.KERNELS, dims, ANY)
    dims = dims._replace(tiles=tiles)
    capacity = compat.tpu.get_tpu_info_for_chip(CHIPS[chip], 1).vmem_capacity_bytes
    assert vmem_bytes(tpu.KERNELS, dims) <= capacity // 2
    assert dims.grid[1] * dims.steps_per_group * tiles.heads == dims.heads


def test_the_chooser_obeys_the_estimator():
    dims = kernel_shape(SHAPES["gated-delta-bench"])
    roomy = choose_tiles(tpu.KERNELS, dims, ANY)
    budget = vmem_bytes(tpu.KERNELS, dims._replace(tiles=roomy)) - 1
    tight = choose_tiles(tpu.KERNELS, dims, Limits(vmem_bytes=budget))
    assert tight.heads < roomy.heads
    assert vmem_bytes(tpu.KERNELS, dims._replace(tiles=tight)) <= budget
    assert choose_tiles(tpu.KERNELS, dims, Limits(vmem_bytes=2**20)) is None


@pytest.mark.full
def test_a_group_too_large_for_vmem_is_split():
    case = Case(length=20, batch=1, groups=1, heads=2)
    one_head_a_group = KernelShape(
        1, 32, 2, 2, 128, 128, "head", False, 1.0, jnp.dtype("float32"), Tiles(CHUNK, 1)
    )
    budget = vmem_bytes(tpu.KERNELS, one_head_a_group)
    assert vmem_bytes(tpu.KERNELS, one_head_a_group._replace(groups=1)) > budget
    limits = SMALL._replace(vmem_bytes=budget)
    testing.assert_close(interpreted(case, limits), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_a_head_too_large_for_vmem_is_refused():
    args, ids = Case(length=9, batch=2).args, jnp.ones((2, 9), jnp.int32)
    with pytest.raises(ValueError, match="K=128 and V=128 does not fit"):
        jax.eval_shape(functools.partial(_run, limits=Limits(vmem_bytes=2**16)), args, ids)
