"""The GPU kernels: interpreted on the host, and their maths."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import delta_rule
from pallas_kernels.common import segments
from pallas_kernels.delta_rule import gpu, gpu_forward, gpu_tile
from pallas_kernels.delta_rule.shapes import SHAPES
from pallas_kernels.matrix_state import masks
from pallas_kernels.matrix_state.config import Config
from pallas_kernels.tools import testing
from tests import tolerances
from tests.pallas_kernels.delta_rule.cases import Case, assert_isolated, normalised
from tests.tiers import one_of_many

# Three chunks where there are 37 tokens, two blocks where there are more than 16 keys or values.
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
TILES = gpu_tile.Tiles(chunk=16, keys=16, values=16, state_values=16)
WIDE = {"size": (20, 18), "heads": 2}


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def _value_and_gradients(args, ids, cotangents):
    config = Config(args["q"].shape[3] ** -0.5, tiles=TILES)

    def op(args):
        given = [args.get(name) for name in NAMES]
        return gpu.BACKEND(config, *given, None if ids is None else segments.index(ids))

    outputs, pullback = jax.vjp(op, args)
    return {"outputs": outputs, "gradients": pullback(cotangents)[0]}


_program = jax.jit(_value_and_gradients)


def interpreted(case, args=None, ids=None, program=_program):
    """What `Case.run` gives, with `TILES`."""
    ids = case.ids if ids is None else ids
    with testing.interpret():
        return jax.tree.map(np.asarray, program(args or case.args, ids, case.cotangents))


# Each feature with most others, not the full product: interpretation is slow.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"decay": None, "packed": True},
    "head": {"decay": "head", **WIDE},
    "head-packed": {"decay": "head", "packed": True, **WIDE, "groups": 1},
    "key-packed": {"decay": "key", "packed": True, **WIDE},
    "one-token": {"decay": "head", "length": 1},
}


@pytest.mark.always("key-packed")
@pytest.mark.parametrize("name", one_of_many(FEATURES, set(FEATURES) - {"head", "plain"}))
def test_kernels_equal_the_oracle(name):
    case = Case(**{"length": 37, "batch": 2, **FEATURES[name]})
    testing.assert_close(interpreted(case), case.oracle(), testing.FLOAT32_TOLERANCE)


@pytest.mark.full
def test_bfloat16_against_the_oracle():
    case = Case(length=37, batch=2, decay="key", dtype="bfloat16")
    actual, expected = interpreted(case), case.oracle()
    assert {n: g.dtype for n, g in actual["gradients"].items()} == {
        n: x.dtype for n, x in case.args.items()
    }
    testing.assert_close(actual["outputs"], expected["outputs"], testing.BFLOAT16_TOLERANCE)
    testing.assert_close(actual["gradients"], expected["gradients"], tolerances.BFLOAT16_GRADIENTS)


@pytest.mark.full
@pytest.mark.parametrize("decay", one_of_many(["head", "key"], ["key"]))
def test_documents_are_isolated_to_the_bit_and_calls_are_repeatable(decay):
    case = Case(length=37, batch=2, decay=decay)
    assert_isolated(functools.partial(interpreted, case), case)


@pytest.mark.full
def test_extreme_gates_and_a_row_of_padding():
    case = Case(length=37, batch=2, decay="head", packed=True)
    rng = np.random.default_rng(1)
    shape = case.args["log_decay"].shape
    chosen = rng.choice([0, -1e-6, -30, -1e4], shape, p=[0.45, 0.45, 0.05, 0.05])
    case.args |= {
        "log_decay": jnp.asarray(chosen, jnp.float32),
        "beta": jnp.asarray(rng.choice([0.0, 1.0], case.args["beta"].shape), jnp.float32),
    }
    assert case.ids is not None
    case.ids = case.ids.at[1].set(0)
    actual = interpreted(case)
    testing.assert_close(actual, case.oracle(), testing.FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(actual["outputs"][1][1], case.args["initial_state"][1])


def documents_run_on(monkeypatch):
    """The state is carried over a document's end."""
    monkeypatch.setattr(gpu_forward, "decayed_state", lambda state, keep, _: state * keep)


def states_shifted(monkeypatch):
    """The state kept for a chunk is the one that leaves it."""
    put = gpu_tile.Chunk.put_state

    def later(chunk, *args):
        put(chunk._replace(index=jnp.maximum(chunk.index - 1, 0)), *args)

    monkeypatch.setattr(gpu_tile.Chunk, "put_state", later)


@pytest.mark.always("documents_run_on")
@pytest.mark.parametrize("mutant", [documents_run_on, states_shifted])
def test_mutants_are_caught(mutant, monkeypatch):
    case = Case(length=37, batch=2, packed=True)
    expected = case.oracle()
    mutant(monkeypatch)
    # A function of its own, so that nothing traced before is found again.
    actual = interpreted(case, program=jax.jit(lambda *args: _value_and_gradients(*args)))
    with pytest.raises(AssertionError, match=r"not finite|>"):
        testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


# The maths.


def lower_triangular(size, repeated):
    rng = np.random.default_rng(0)
    k = normalised(rng.standard_normal((1 if repeated else size, 8)))
    return np.tril(np.broadcast_to(k, (size, 8)) @ np.broadcast_to(k, (size, 8)).T, -1)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("size", [16, 64])
def test_inverse(size, repeated):
    lower = lower_triangular(size, repeated)
    expected = np.linalg.inv(np.eye(size) + lower)
    actual = jax.jit(functools.partial(gpu_tile.inverse, segmented=True))(
        jnp.asarray(lower, jnp.float32)
    )
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


def test_inverse_in_blocks():
    """A chunk of 64 tokens, which the kernel takes in two blocks of 32."""
    dims = gpu._kernel_shape(Config(1.0, 64), *(jnp.zeros((1, 64, 1, 8)),) * 2, None, None)
    keys = lower_triangular(64, repeated=False)
    beta = np.random.default_rng(1).uniform(0, 1, (64, 1))
    with testing.interpret():
        made = gpu._call(
            gpu_forward.solve_tril,
            dims,
            (1, 1, 1),
            {
                "A_kk": jnp.asarray(keys, jnp.float32)[None, None, None],
                "beta": jnp.asarray(beta, jnp.float32)[None],
            },
            {"inverse": ((1, 1, 1, 64, 64), jnp.float32)},
            warps=2,
            flops=1,
        )
    expected = np.linalg.inv(np.eye(64) + beta * keys)
    testing.assert_close(made["inverse"][0, 0, 0], expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("contract", ["nn", "nt", "tn"])
def test_products_of_pieces_are_float32(contract):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 32, 32)).astype(np.float32)
    expected = (x.T if contract[0] == "t" else x).astype(np.float64)
    expected = expected @ (y.T if contract[1] == "t" else y)
    testing.assert_close(
        gpu_tile.dot(jnp.asarray(x), jnp.asarray(y), contract), expected, tolerances.FLOAT32_PRODUCT
    )


def test_factors_of_levels():
    """Against sums in double precision, and the transpose against the sums."""
    rng = np.random.default_rng(0)
    g, other = -rng.exponential(1, (2, 32, 16))
    token = np.arange(32)
    for at in masks.level_sizes(32):
        second = (token & at != 0)[:, None]
        near = (token[:, None] // at) == (token // at)
        marks = near & np.where(second, token <= token[:, None], token > token[:, None])
        actual = gpu_tile.factor_at(jnp.asarray(g, jnp.float32), jnp.int32(at))
        testing.assert_close(actual, np.exp(marks @ g), testing.FLOAT32_TOLERANCE)
        down = gpu_tile.factor_at_transpose(jnp.asarray(other, jnp.float32), jnp.int32(at))
        testing.assert_close(down, marks.T @ other, testing.FLOAT32_TOLERANCE)


# Where it runs.


def test_explain_and_arrays_that_are_too_large():
    args = SHAPES["gated-delta-bench"].operands()
    choices = pallas_kernels.explain(delta_rule, **args)
    choices = {c.platform: c for c in choices if c.op == "delta_rule"}
    assert choices["cuda"].implementation == "gpu"
    assert choices["rocm"].implementation == "xla"
    long = SHAPES["gated-delta-bench"].scaled(128.0).operands()
    choices = pallas_kernels.explain(delta_rule, **long)
    choices = {c.platform: c for c in choices if c.op == "delta_rule"}
    assert "addresses hold 2**31" in choices["cuda"].skipped["gpu"]
