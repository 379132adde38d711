"""The GPU kernels: interpreted on the host, and their sums in plain JAX."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import segments
from pallas_kernels.linear_attention import gpu, gpu_kernels
from pallas_kernels.linear_attention.shapes import SHAPES
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.tools import testing
from tests import tolerances
from tests.pallas_kernels.linear_attention.cases import NAMES, Case, assert_isolated
from tests.tiers import one_of_many

# Three chunks where there are 37 tokens, two blocks where there are more than 16 keys or values.
TILES = gpu_kernels.Tiles(chunk=16, values=16, keys=16, inner=16, state=16)
WIDE = {"key_size": 20, "value_size": 18}


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def interpreted(case, tiles=TILES, ids=None):
    """What `Case.run` gives, with these tiles."""
    args, ids = dict(case.args), case.ids if ids is None else ids
    segment_index = None if ids is None else segments.index(ids)
    config = Config(args["q"].shape[3] ** -0.5, tiles=tiles)

    def op(args):
        q, k, v, log_decay, state = (args[name] for name in NAMES)
        if log_decay is not None and log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, v.shape[:3])
        return gpu.BACKEND(config, q, k, v, log_decay, state, segment_index)

    with testing.interpret():
        result = testing.value_and_gradients(op, args, cotangents=case.cotangents)
    return jax.tree.map(np.asarray, result | {"gradients": result["gradients"][0]})


# Each feature with most others, not the full product: interpretation is slow.
FEATURES = {
    "plain": {"decay": None, "batch": 1},
    "plain-packed": {"decay": None, "packed": True, "length": 20},
    "constant": {"decay": "constant", "groups": 2, **WIDE},
    "head-packed": {"decay": "head", "packed": True, "groups": 2, "heads": 4, "batch": 1},
    "key": {"decay": "key", "batch": 1, "heads": 1, **WIDE},
    "key-packed": {"decay": "key", "packed": True, "batch": 1},
    "one-token": {"decay": "head", "length": 1, "batch": 1},
}


@pytest.mark.always("key-packed", "head-packed")
@pytest.mark.parametrize("name", one_of_many(FEATURES, set(FEATURES) - {"plain", "key"}))
def test_kernels_equal_the_oracle(name):
    case = Case(**({"length": 37} | FEATURES[name]))
    testing.assert_close(interpreted(case), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_a_program_sums_the_gradients_of_some_heads_of_a_group():
    case = Case(length=20, decay="head", batch=1, groups=2, heads=8, packed=True)
    actual = interpreted(case, TILES._replace(heads=2))
    testing.assert_close(actual, case.oracle(), testing.FLOAT32_TOLERANCE)


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


@pytest.mark.always("head")
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


@jax.jit
def _run(args, ids):
    segment_index = segments.index(ids)
    q, k, v, state = (args[name] for name in ("q", "k", "v", "initial_state"))
    return gpu.BACKEND(
        Config(5**-0.5, tiles=TILES), q, k, v, args["log_decay"], state, segment_index
    )


def test_the_same_call_twice_is_bitwise_equal():
    case = Case(length=37, decay="head", batch=1, packed=True)
    with testing.interpret():
        once, twice = (jax.tree.map(np.asarray, _run(case.args, case.ids)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, twice)


@hypothesis.settings(
    max_examples=8,
    deadline=None,
)
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


def test_a_row_of_padding_returns_its_initial_state():
    case = Case(length=20, decay="head", batch=2)
    with testing.interpret():
        o, final = _run(case.args, jnp.zeros((2, 20), jnp.int32))
    np.testing.assert_array_equal(o, np.zeros_like(o))
    np.testing.assert_array_equal(final, case.args["initial_state"])


def broken_carry_not_handed_on(monkeypatch):
    monkeypatch.setattr(gpu_kernels.tile, "decayed_state", lambda state, *_: state * 0)


def broken_states_shifted_by_one_chunk(monkeypatch):
    load = gpu_kernels.Row.load

    def shifted(self, name, *index):
        if name == "states":
            index = (jnp.maximum(index[0] - 1, 0), *index[1:])
        return load(self, name, *index)

    monkeypatch.setattr(gpu_kernels.Row, "load", shifted)


@pytest.mark.parametrize("mutant", [broken_carry_not_handed_on, broken_states_shifted_by_one_chunk])
def test_mutants_are_caught(mutant, monkeypatch):
    case = Case(length=37, decay="head")
    expected = case.oracle()["outputs"]
    mutant(monkeypatch)
    ids = jnp.ones((2, 37), jnp.int32)
    with testing.interpret():
        # A function of its own, so that nothing traced before is found again.
        outputs = jax.jit(lambda *args: _run.__wrapped__(*args))(case.args, ids)
        outputs = jax.tree.map(np.asarray, outputs)
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(outputs, expected, testing.FLOAT32_TOLERANCE)


# Tiles.


def kernel_shape(shape, **changes):
    decay = {"constant": "head"}.get(shape.decay, shape.decay)
    sizes = shape.batch, shape.length, shape.groups, shape.heads, shape.key_size, shape.value_size
    dims = gpu_kernels.KernelShape(*sizes, decay, False, 1.0, jnp.dtype(shape.dtype), TILES)
    return dims._replace(**changes)


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_cover_the_arrays(name):
    dims = kernel_shape(SHAPES[name])
    dims = dims._replace(tiles=gpu.choose_tiles(dims))
    tiles = dims.tiles
    assert dims.heads // dims.groups % tiles.heads == 0
    for size in (*tiles[:5], tiles.warps):
        assert size & (size - 1) == 0
    assert dims.value_grid[1] * tiles.values >= dims.value_size
    assert dims.key_grid[1] * tiles.keys >= dims.key_size
    assert (dims.chunks - 1) * tiles.chunk < dims.length <= dims.chunks * tiles.chunk


def test_as_many_heads_a_program_as_leave_the_gpu_full():
    shape = SHAPES["mamba2-2.7b"]
    long, short = (gpu.choose_tiles(kernel_shape(shape, length=n)) for n in (2**16, 2**8))
    assert long.heads > short.heads >= 1
    dims = kernel_shape(shape, length=2**16)._replace(tiles=long)
    assert np.prod(dims.key_grid) >= gpu._PROGRAMS_THAT_FILL_A_GPU


def test_arrays_of_two_billion_elements_are_refused():
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, v = struct((1, 2**17, 1, 256)), struct((1, 2**17, 16, 256))
    assert gpu.largest_array(Config(1.0), q, v, None) >= 2**31
