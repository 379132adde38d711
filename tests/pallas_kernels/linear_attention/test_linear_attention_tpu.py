"""The TPU kernels: interpreted on the host, and their sums in numpy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import compat, segments
from pallas_kernels.linear_attention import tpu
from pallas_kernels.linear_attention.shapes import SHAPES
from pallas_kernels.matrix_state import decay_sums, tpu_vector_decay
from pallas_kernels.matrix_state import tpu as matrix_tpu
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.matrix_state.tpu import KernelShape, Limits, Tiles, choose_tiles, vmem_bytes
from pallas_kernels.matrix_state.tpu_scalar_decay import slab_sums
from pallas_kernels.tools import testing
from tests import tolerances
from tests.pallas_kernels.linear_attention.cases import NAMES, Case, assert_isolated

CHUNK = 16
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


# Three chunks and two blocks of heads where there are 37 tokens and two or more heads.
SMALL, ANY = Limits(heads=1, heads_vector_decay=1), Limits()


def interpreted(case, limits=SMALL, ids=None):
    """What `Case.run` gives, in chunks of `CHUNK` tokens."""
    args, ids = dict(case.args), case.ids if ids is None else ids
    segment_index = None if ids is None else segments.index(ids)
    config = Config(args["q"].shape[3] ** -0.5, CHUNK, limits)

    def op(args):
        q, k, v, log_decay, state = (args[name] for name in NAMES)
        if log_decay is not None and log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, v.shape[:3])
        return tpu.BACKEND(config, q, k, v, log_decay, state, segment_index)

    with testing.interpret():
        result = testing.value_and_gradients(op, args, cotangents=case.cotangents)
    return jax.tree.map(np.asarray, result | {"gradients": result["gradients"][0]})


# Each feature with each other at least once, not the full product: interpretation is slow.
FEATURES = {
    "groups-in-parts": {"decay": "head", "packed": True, "groups": 2, "heads": 4, "batch": 1},
    "alone": {"decay": "head", "groups": 2},
    "plain-packed": {"decay": None, "packed": True, "groups": 1, "length": 20},
    "key-packed": {"decay": "key", "packed": True, "groups": 2},
    "key-grouped": {"decay": "key", "batch": 1, "length": 48},
}


@pytest.mark.always("key-packed")
@pytest.mark.parametrize("name", FEATURES)
def test_kernels_equal_the_oracle(name):
    case = Case(**({"length": 37} | FEATURES[name]))
    testing.assert_close(interpreted(case), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_several_groups_in_one_step():
    case = Case(length=1, batch=1, decay="constant", groups=2, heads=4, packed=True)
    testing.assert_close(interpreted(case, ANY), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("decay", ["head", "key"])
def test_bfloat16_against_the_float32_oracle(decay):
    sizes = {"key_size": 32, "value_size": 16, "batch": 1, "heads": 1}
    case = Case(length=64, decay=decay, dtype="bfloat16", packed=True, **sizes)
    actual, expected = interpreted(case), case.oracle()
    assert actual["outputs"][0].dtype == jnp.bfloat16
    assert actual["outputs"][1].dtype == np.float32
    assert actual["gradients"]["log_decay"].dtype == np.float32
    testing.assert_close(actual["outputs"], expected["outputs"], tolerances.BFLOAT16)
    testing.assert_close(actual["gradients"], expected["gradients"], tolerances.BFLOAT16_GRADIENTS)


@pytest.mark.full
@pytest.mark.parametrize("decay", ["head", "key"])
def test_documents_are_isolated_to_the_bit(decay):
    case = Case(length=37, decay=decay, batch=1, heads=1)
    assert_isolated(interpreted, case)


@pytest.mark.always("key")
@pytest.mark.parametrize("decay", ["head", "key"])
def test_extreme_decays(decay):
    """Decays of 1 and 0 beside ordinary ones; gradients of clamped ones are 0."""
    case = Case(length=40, decay=decay, batch=1, heads=1)
    g = np.array(case.args["log_decay"])
    g[:, 3::7], g[:, 5::7], g[:, 20:30] = 0.0, -1e30, -103.0
    case = case.replaced(log_decay=jnp.asarray(g))
    actual, expected = interpreted(case), case.oracle()
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(actual["gradients"]["log_decay"][:, 5::7], 0)


@functools.partial(jax.jit, static_argnames="limits")
def _run(args, ids, limits=ANY):
    segment_index = segments.index(ids)
    q, k, v, state = (args[name] for name in ("q", "k", "v", "initial_state"))
    return tpu.BACKEND(
        Config(5**-0.5, CHUNK, limits), q, k, v, args["log_decay"], state, segment_index
    )


def test_the_same_call_twice_is_bitwise_equal():
    case = Case(length=37, decay="head", batch=1, packed=True)
    with testing.interpret():
        once, twice = (jax.tree.map(np.asarray, _run(case.args, case.ids)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, twice)


@pytest.mark.full
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), padding=st.integers(0, 20)
)
def test_any_segmentation(lengths, padding):
    case = Case(length=37, decay="head", batch=1)
    ids = np.repeat(np.arange(len(lengths)) + 1, lengths)[: 37 - padding]
    case.ids = jnp.asarray(np.pad(ids, (0, 37 - len(ids)))[None], jnp.int32)
    with testing.interpret():
        actual = jax.tree.map(np.asarray, _run(case.args, case.ids))
    testing.assert_close(actual, case.oracle()["outputs"], testing.FLOAT32_TOLERANCE)


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
    case = Case(length=37, decay="head")
    expected = case.oracle()["outputs"]
    mutant(monkeypatch)
    ids = jnp.ones((2, 37), jnp.int32)
    with testing.interpret():
        # A function of its own, so that nothing traced before is found again.
        outputs = jax.jit(lambda *args: _run.__wrapped__(*args, SMALL))(case.args, ids)
        outputs = jax.tree.map(np.asarray, outputs)
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(outputs, expected, testing.FLOAT32_TOLERANCE)


# Sums and products of decays.


def test_sums_between_slabs():
    g = -np.random.default_rng(0).uniform(0, 3, (2, 32)).astype(np.float32)
    before, inside, prefix, start = slab_sums(jnp.asarray(g), jnp.roll)
    for j in range(32):
        slab, place = divmod(j, 8)
        np.testing.assert_allclose(
            prefix[:, j], g[:, slab * 8 : j + 1].sum(1), **tolerances.EACH_FLOAT32_TERMS
        )
        np.testing.assert_allclose(
            start[:, j], g[:, : slab * 8].sum(1), **tolerances.EACH_FLOAT32_TERMS
        )
        for n in range(5):
            np.testing.assert_allclose(
                before[n][:, j], g[:, j + 1 : n * 8].sum(1), **tolerances.EACH_FLOAT32_TERMS
            )
        for r in range(8):
            expected = g[:, j + 1 : slab * 8 + r + 1].sum(1)
            np.testing.assert_allclose(
                inside[r][:, j], expected, **tolerances.EACH_FLOAT32_TERMS, err_msg=str(place)
            )


def test_products_up_the_tree_are_exponentials_of_sums():
    g = -np.random.default_rng(0).uniform(0, 0.5, (64, 3)).astype(np.float32)
    actual = tpu_vector_decay.factors(jnp.exp(jnp.asarray(g)), 0.5, jnp.roll)
    sums = decay_sums.BY_HALVES.cumsum(jnp.asarray(g))
    testing.assert_close(
        actual.level_factors, [np.exp(x) for x in sums.level_sums], tolerances.FLOAT32_TERMS
    )
    testing.assert_close(actual.from_start, 0.5 * np.exp(sums.g_cumsum), tolerances.FLOAT32_TERMS)
    testing.assert_close(
        (actual.to_end, actual.chunk_decay),
        (np.exp(sums.g_to_end), np.exp(sums.g_last)),
        tolerances.FLOAT32_TERMS,
    )


def test_log_gradient_is_the_transpose_of_the_sums():
    rng = np.random.default_rng(0)
    summation = decay_sums.BY_HALVES
    levels = [jnp.asarray(rng.standard_normal((64, 3)), jnp.float32) for _ in range(6)]
    into, out = (jnp.asarray(rng.standard_normal((64, 3)), jnp.float32) for _ in range(2))
    zero = jnp.zeros((1, 3), jnp.float32)
    expected = summation.cumsum_vjp(decay_sums.DecaySums(levels, into, out, zero))
    testing.assert_close(
        tpu_vector_decay.log_gradient(levels, into, out, jnp.roll),
        expected,
        tolerances.FLOAT32_TERMS,
    )


# Memory.


def kernel_shape(shape):
    decay = {"constant": "head"}.get(shape.decay, shape.decay)
    keys, values = (-(-size // 128) * 128 for size in (shape.key_size, shape.value_size))
    length = -(-shape.length // 128) * 128
    sizes = (shape.batch, length, shape.groups, shape.heads, keys, values)
    return KernelShape(*sizes, decay, True, 1.0, jnp.dtype(shape.dtype), Tiles(128, 1))


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
    dims = kernel_shape(SHAPES["head-bench"])
    roomy = choose_tiles(tpu.KERNELS, dims, ANY)
    budget = vmem_bytes(tpu.KERNELS, dims._replace(tiles=roomy)) - 1
    tight = choose_tiles(tpu.KERNELS, dims, Limits(vmem_bytes=budget))
    assert tight.heads < roomy.heads
    assert vmem_bytes(tpu.KERNELS, dims._replace(tiles=tight)) <= budget
    assert choose_tiles(tpu.KERNELS, dims, Limits(vmem_bytes=2**20)) is None


@pytest.mark.full
def test_a_group_too_large_for_vmem_is_split():
    case = Case(length=20, batch=1, decay="head", heads=2)
    one_head_a_group = KernelShape(
        1, 32, 2, 2, 128, 128, "head", False, 1.0, jnp.dtype("float32"), Tiles(CHUNK, 1)
    )
    budget = vmem_bytes(tpu.KERNELS, one_head_a_group)
    assert vmem_bytes(tpu.KERNELS, one_head_a_group._replace(groups=1)) > budget
    limits = SMALL._replace(vmem_bytes=budget)
    testing.assert_close(interpreted(case, limits), case.oracle(), testing.FLOAT32_TOLERANCE)


def test_a_head_too_large_for_vmem_is_refused():
    args, ids = Case(length=9, decay="head").args, jnp.ones((2, 9), jnp.int32)
    with pytest.raises(ValueError, match="K=128 and V=128 does not fit"):
        jax.eval_shape(functools.partial(_run, limits=Limits(vmem_bytes=2**16)), args, ids)
