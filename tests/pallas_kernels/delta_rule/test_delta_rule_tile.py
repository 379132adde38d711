"""The maths of one chunk, in plain jnp: what the kernels are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import tile
from pallas_kernels.matrix_state import decay_sums, masks
from pallas_kernels.tools import testing
from tests import tolerances
from tests.pallas_kernels.delta_rule.cases import DECAYS, normalised

SIZE, KEYS, VALUES, SCALE = 16, 8, 6, 0.3


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def inputs(decay, dtype="float64", size=(SIZE, KEYS, VALUES), seed=0):
    """`(q, k, v, beta, g or None, state)` and the cotangents of `(o, state')`."""
    tokens, keys, values = size
    rng = np.random.default_rng(seed)
    wide = "float64" if dtype == "float64" else "float32"

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    width = {None: None, "head": 1, "key": keys}[decay]
    g = None if width is None else -jnp.abs(normal(tokens, width, dtype=wide)) / 4
    args = (
        normal(tokens, keys),
        jnp.asarray(normalised(rng.standard_normal((tokens, keys))), dtype),
        normal(tokens, values),
        jnp.asarray(rng.uniform(0, 1, (tokens, 1)), wide),
        g,
        normal(values, keys, dtype=wide),
    )
    return args, (normal(tokens, values), normal(values, keys, dtype=wide))


def documents(segment_index, entering=1):
    segment_index = np.asarray(segment_index, np.int32)
    entering = np.full((1, 1), entering, np.int32)
    return jax.jit(masks.segment_masks)(segment_index[:, None], segment_index[None], entering)


SOME = documents([1] * 5 + [2] * 4 + [3] * 5 + [0] * 2)


def forward(docs, q, k, v, beta, g, state):
    gates = tile.gates(beta, g, docs, decay_sums.BY_HALVES)
    return tile.forward(q, k, v, gates, docs, state, SCALE)


def backward(docs, q, k, v, beta, g, state, do, dstate):
    summation = decay_sums.BY_HALVES
    gates = tile.gates(beta, g, docs, summation)
    return tile.backward(q, k, v, gates, docs, state, do, dstate, SCALE, summation)


def recurrence(q, k, v, beta, g, state):
    """One document, in numpy."""
    q, k, v, beta, state = (np.asarray(x, np.float64) for x in (q, k, v, beta, state))
    out, state = [], state.T
    for t in range(len(q)):
        if g is not None:
            state = (
                np.exp(np.broadcast_to(np.asarray(g, np.float64)[t], k[t].shape))[:, None] * state
            )
        state = state + beta[t] * np.outer(k[t], v[t] - state.T @ k[t])
        out.append(SCALE * state.T @ q[t])
    return np.stack(out), state.T


@pytest.mark.parametrize("decay", DECAYS)
def test_forward_is_the_recurrence(decay):
    with jax.enable_x64(True):
        args, _ = inputs(decay)
        actual = jax.jit(functools.partial(forward, None))(*args)
        testing.assert_close(actual, recurrence(*args), testing.FLOAT64_TOLERANCE)


@pytest.mark.parametrize("decay", DECAYS)
def test_forward_keeps_documents_apart(decay):
    with jax.enable_x64(True):
        args, _ = inputs(decay)
        o, last = jax.jit(functools.partial(forward, SOME))(*args)
        for tokens in (slice(0, 5), slice(5, 9), slice(9, 14)):
            q, k, v, beta, g, state = args
            part = [None if x is None else x[tokens] for x in (q, k, v, beta, g)]
            state = state if tokens.start == 0 else jnp.zeros_like(state)
            expected, after = recurrence(*part, state)
            testing.assert_close(o[tokens], expected, testing.FLOAT64_TOLERANCE)
        testing.assert_close(last, after, testing.FLOAT64_TOLERANCE)
        np.testing.assert_array_equal(o[14:], 0)


@pytest.mark.parametrize("docs", [None, SOME], ids=["one", "several"])
@pytest.mark.parametrize("decay", DECAYS)
def test_backward_is_the_derivative_of_forward(decay, docs):
    with jax.enable_x64(True):
        (q, k, v, beta, g, state), cotangents = inputs(decay)
        given = [x for x in (q, k, v, beta, g, state) if x is not None]

        def op(*given):
            *rest, state = given
            return forward(docs, *rest, *[None] * (g is None), state)

        @jax.jit
        def both(given, cotangents):
            return jax.vjp(op, *given)[1](cotangents), backward(
                docs, q, k, v, beta, g, state, *cotangents
            )

        expected, actual = both(given, cotangents)
        actual = [x for x in actual if x is not None]
        testing.assert_close(actual, list(expected), testing.FLOAT64_TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("decay", ["head", "key"])
def test_bfloat16_operands(decay):
    """As in the kernels: operands of matmuls are narrow, sums and states are not."""
    args, cotangents = inputs(decay, "bfloat16", (64, 64, 64))
    actual = jax.jit(functools.partial(forward, None))(*args)
    gradients = jax.jit(functools.partial(backward, None))(*args, *cotangents)
    with jax.enable_x64(True):
        wide, wide_cotangents = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x).astype(np.float64)), (args, cotangents)
        )
        expected = jax.jit(functools.partial(forward, None))(*wide)
        wide_gradients = jax.jit(functools.partial(backward, None))(*wide, *wide_cotangents)
    testing.assert_close(actual, expected, testing.BFLOAT16_TOLERANCE)
    testing.assert_close(gradients, wide_gradients, tolerances.BFLOAT16_GRADIENTS)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
@pytest.mark.parametrize("kind", ["random", "ones"])
def test_inverse(kind, size):
    """Also where its power series has terms of 1e18 that cancel to 1."""
    keys = normalised(np.random.default_rng(0).standard_normal((size, 8)))
    lower = np.tril(keys @ keys.T if kind == "random" else np.ones((size, size)), -1)
    actual = jax.jit(lambda x: tile.inverse(x, None))(jnp.asarray(lower, jnp.float32))
    expected = np.linalg.inv(np.eye(size) + lower)
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


def test_inverse_of_documents_that_overflow():
    """Rows of the others are the same to the bit; the first broken one is seen."""
    keys = normalised(np.random.default_rng(0).standard_normal((SIZE, 8)))
    lower = np.where(np.asarray(SOME.same), np.tril(keys @ keys.T, -1), 0).astype(np.float32)
    broken = lower.copy()
    broken[6, 5] = np.inf
    inverse = jax.jit(lambda x: tile.inverse(x, SOME))
    before, after = (np.asarray(inverse(jnp.asarray(x))) for x in (lower, broken))
    others = np.r_[0:5, 9:16]
    np.testing.assert_array_equal(after[others], before[others])
    assert not np.isfinite(after[6, 5])


def test_two_ways_to_sum_decays():
    """A kernel exchanges halves by rolls; in the gradients too."""
    args, cotangents = inputs("key", "float32")
    expected = jax.jit(functools.partial(backward, SOME))(*args, *cotangents)

    def by_rolls(q, k, v, beta, g, state, do, dstate):
        summation = decay_sums.summation(decay_sums.by_rolls(jnp.roll, below=8))
        gates = tile.gates(beta, g, SOME, summation)
        return tile.backward(q, k, v, gates, SOME, state, do, dstate, SCALE, summation)

    testing.assert_close(jax.jit(by_rolls)(*args, *cotangents), expected, testing.FLOAT32_TOLERANCE)
