"""The exchange of states between the shards of a row, against a loop over the shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.tools import testing
from seqmodels.parallel.state import STRATEGIES, entering_state
from tests.seqmodels.parallel.hlo import collectives
from tests.tiers import one_of_many

BATCH, HEADS, KEYS, VALUES = 2, 2, 3, 6
KINDS = {
    "element": (KEYS, VALUES),
    "key": (KEYS, 1),
    "complex": (KEYS, VALUES),
    "matrix": (KEYS,) * 2,
}
SHARDS = (1, 2, 3, 8)


def maps(kind, shards, seed=0):
    """Summaries ``(P, B, ...)`` of slow decays, one of which lets nothing through, and a state."""
    rng = np.random.default_rng(seed)
    decay = np.exp(-0.05 * rng.random((shards, BATCH, HEADS, *KINDS[kind])))
    if kind == "matrix":
        decay = np.eye(KEYS) * decay + 0.1 * rng.standard_normal(decay.shape)
    if shards > 2:
        decay[1, 1] = 0
    shape = (BATCH, HEADS, KEYS, VALUES)
    state, initial = rng.standard_normal((shards, *shape)), rng.standard_normal(shape)
    cotangent = rng.standard_normal((shards, *shape))
    if kind == "complex":
        turn = np.exp(1j * rng.standard_normal(decay.shape))
        return decay * turn, state * (1 + 2j), initial * (2 - 1j), cotangent * (1 - 1j)
    return decay, state, initial, cotangent


def loop(kind, reverse, decay, state, initial):
    """The states that enter, shard by shard."""
    states, entering = initial, [None] * len(decay)
    for r in range(len(decay))[:: -1 if reverse else 1]:
        entering[r] = states
        through = decay[r] @ states if kind == "matrix" else decay[r] * states
        states = through + state[r]
    return jnp.stack(entering)


def exchanged(kind, strategy, reverse, shards):
    mesh = Mesh(np.asarray(jax.devices()[:shards]), ("seq",))

    def one(decay, state, initial):
        entering = entering_state(
            decay[0],
            state[0],
            initial,
            axis="seq",
            size=shards,
            strategy=strategy,
            matrix=kind == "matrix",
            reverse=reverse,
        )
        return entering[None]

    specs = (P("seq"), P("seq"), P())
    return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P("seq"))


def gradients(function):
    def run(decay, state, initial, cotangent):
        entering, pullback = jax.vjp(function, decay, state, initial)
        return entering, pullback(cotangent)

    return jax.jit(run)


def narrow(x):
    return jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32)


CASES = [
    (kind, strategy, reverse, shards)
    for kind in KINDS
    for strategy in STRATEGIES
    for reverse in (False, True)
    for shards in SHARDS
]
ALWAYS = [
    *(("element", strategy, False, 3) for strategy in STRATEGIES),
    *(("matrix", strategy, True, 8) for strategy in STRATEGIES),
    ("key", "chain", True, 3),
    ("complex", "doubling", False, 8),
    ("element", "doubling", False, 2),
    ("element", "all_gather", False, 1),
]


@pytest.mark.parametrize(("kind", "strategy", "reverse", "shards"), one_of_many(CASES, ALWAYS))
def test_what_enters_each_shard_is_what_the_loop_says(kind, strategy, reverse, shards):
    arguments = maps(kind, shards)
    with jax.enable_x64(True):
        expected = gradients(lambda *x: loop(kind, reverse, *x))(*map(jnp.asarray, arguments))
        expected = jax.tree.map(np.asarray, expected)
    run = gradients(exchanged(kind, strategy, reverse, shards))
    actual, (decay, state, initial) = run(*map(narrow, arguments))
    for r in range(shards):  # a shard's error must not hide behind the others'
        testing.assert_close(actual[r], expected[0][r], testing.FLOAT32_TOLERANCE)
        testing.assert_close(decay[r], expected[1][0][r], testing.FLOAT32_TOLERANCE)
        testing.assert_close(state[r], expected[1][1][r], testing.FLOAT32_TOLERANCE)
    testing.assert_close(initial, expected[1][2], testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_infinite_state_stops_where_a_document_begins(strategy):
    decay, state, initial, _ = map(narrow, maps("key", 3))
    decay = decay.at[1].set(0.0)
    run = jax.jit(exchanged("key", strategy, False, 3))
    np.testing.assert_array_equal(
        run(decay, state, initial)[2], run(decay, state.at[0].set(jnp.inf), initial)[2]
    )


@pytest.mark.parametrize(
    ("strategy", "forward", "both"),
    [
        ("all_gather", {"all-gather": 1}, {"all-gather": 2}),
        ("doubling", {"collective-permute": 4}, {"collective-permute": 8}),
        ("chain", {"collective-permute": 1}, {"collective-permute": 2}),  # in a loop
    ],
)
def test_so_many_collectives_and_no_more(strategy, forward, both):
    arguments = tuple(map(narrow, maps("key", 8)))
    function = exchanged("key", strategy, False, 8)
    assert counted(jax.jit(function), *arguments[:3]) == forward
    fixed = arguments[2]

    def run(decay, state, cotangent):  # the sum over shards of the initial state's is not counted
        return jax.vjp(lambda *x: function(*x, fixed), decay, state)[1](cotangent)

    assert counted(jax.jit(run), *arguments[:2], arguments[3]) == both


def counted(function, *arguments):
    return {kind: count for kind, (count, _) in collectives(function, *arguments).items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_backward_pass_keeps_one_shards_map_and_state(strategy):
    arguments = tuple(map(narrow, maps("key", 8)))[:3]
    kept = []

    def residuals(*arguments):
        entering, pullback = jax.vjp(exchanged("key", strategy, False, 8), *arguments)
        kept.extend(jax.tree.leaves(pullback))
        return entering

    jax.eval_shape(residuals, *arguments)
    decay, state, _ = arguments
    assert sorted(x.size for x in kept if x.ndim) == sorted((decay.size, state.size))
