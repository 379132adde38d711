"""What a row does to any state that enters it: the same from the whole row and from its pieces."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import dispatch, segments
from pallas_kernels.common.backend import call_op, summarize
from pallas_kernels.delta_rule import api as delta_rule
from pallas_kernels.diagonal_ssm import api as diagonal_ssm
from pallas_kernels.diagonal_ssm import tile as diagonal_tile
from pallas_kernels.linear_attention import api as linear_attention
from pallas_kernels.linear_scan import api as linear_scan
from pallas_kernels.linear_scan import tile as scan_tile
from pallas_kernels.matrix_state.config import Config as MatrixConfig
from pallas_kernels.selective_scan import api as selective_scan
from pallas_kernels.selective_scan import tile as selective_tile
from pallas_kernels.tools import testing
from tests.tiers import one_of_many

BATCH, LENGTH = 2, 21
# Three documents and one that goes on into padding; the cut is inside the last and at a border.
IDS = np.array([[1] * 5 + [2] * 8 + [3] * 8, [4] * 17 + [0] * 4], np.int32)
CUTS = (7, 13)


def normal(*shape):
    rng = np.random.default_rng(sum(shape))
    return rng.standard_normal(shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def decays(*shape):
    """Log decays that leave something of a state after a row."""
    return -np.log1p(np.exp(normal(*shape))) / 8


def tokens(*shape):
    return normal(BATCH, LENGTH, *shape)


KEYS = tokens(1, 4)
KEYS = KEYS / np.linalg.norm(KEYS, axis=-1, keepdims=True)
BETA = sigmoid(tokens(2))
STATE = normal(BATCH, 2, 4, 3)
SCALE = MatrixConfig(0.5)
COMPLEX = (-np.abs(normal(3, 2)) / 4 + 1j * normal(2, 3).T).astype(np.complex64)

# By name: op, config, arrays by token, arrays without time, where in the order these stand, state.
CASES = {
    "linear_scan": (
        linear_scan.OP,
        scan_tile.Config(False),
        {0: sigmoid(tokens(5)), 1: tokens(5)},
        {},
        normal(BATCH, 5),
    ),
    "linear_scan, one decay": (
        linear_scan.OP,
        scan_tile.Config(False),
        {1: tokens(5)},
        {0: sigmoid(normal(5))},
        normal(BATCH, 5),
    ),
    "selective_scan": (
        selective_scan.OP,
        selective_tile.Config(dt_softplus=True, reverse=False),
        {0: tokens(4), 1: tokens(4) / 2, 3: tokens(3), 4: tokens(3), 6: tokens(4) / 3},
        {2: decays(4, 3), 5: normal(4), 7: normal(4) / 5},
        normal(BATCH, 4, 3),
    ),
    "diagonal_ssm": (
        diagonal_ssm.OP,
        diagonal_tile.Config(False),
        {0: tokens(3)},
        {1: COMPLEX, 2: COMPLEX},
        np.repeat(COMPLEX[None], BATCH, axis=0),
    ),
    "linear_attention, none": (
        linear_attention.OP,
        SCALE,
        {0: tokens(1, 4), 1: KEYS, 2: tokens(2, 3)},
        {3: None},
        STATE,
    ),
    "linear_attention, head": (
        linear_attention.OP,
        SCALE,
        {0: tokens(1, 4), 1: KEYS, 2: tokens(2, 3), 3: decays(BATCH, LENGTH, 2)},
        {},
        STATE,
    ),
    "linear_attention, key": (
        linear_attention.OP,
        SCALE,
        {0: tokens(1, 4), 1: KEYS, 2: tokens(2, 3), 3: decays(BATCH, LENGTH, 2, 4)},
        {},
        STATE,
    ),
    "delta_rule, head": (
        delta_rule.OP,
        SCALE,
        {0: tokens(1, 4), 1: KEYS, 2: tokens(2, 3), 3: BETA, 4: decays(BATCH, LENGTH, 2)},
        {},
        STATE,
    ),
    "delta_rule, key": (
        delta_rule.OP,
        SCALE,
        {0: tokens(1, 4), 1: KEYS, 2: tokens(2, 3), 3: BETA, 4: decays(BATCH, LENGTH, 2, 4)},
        {},
        STATE,
    ),
}
PALLAS = ("linear_scan", "diagonal_ssm", "linear_attention, key", "delta_rule, head")


def apply(decay, state):
    """The decay applied to a state: times it, or for the delta rule a matrix product."""
    square = decay.ndim == 4 and decay.shape[2] == decay.shape[3] > 1
    if not square:
        return decay * state
    return jnp.einsum("bhij,bhjv->bhiv", decay, state, precision="highest")


def measure(name, implementation, packed):
    """`(final state, (decay, state) of the row, the fold of three pieces)`."""
    op, config, timed, fixed, initial = CASES[name]
    zero = jnp.zeros_like(initial)

    def arrays(timed, ids, state):
        order = timed | fixed
        segment_index = None if ids is None else segments.index(ids)
        return (*(order[i] for i in sorted(order)), state, segment_index)

    def everything(timed, ids, initial):
        def piece(start, stop):
            cut = {i: x[:, start:stop] for i, x in timed.items()}
            part = None if ids is None else ids[:, start:stop]
            given = arrays(cut, part, zero)
            decay, state = summarize(op, config, *given, implementation=implementation)
            if ids is not None and start > 0:
                # A cut between two documents: the second forgets, which its caller knows.
                new = (ids[:, start] != ids[:, start - 1]) & (ids[:, start] != 0)
                new = new.reshape(-1, *(1,) * (decay.ndim - 1))
                decay = jnp.where(new, jnp.zeros_like(decay), decay)
            return decay, state

        given = arrays(timed, ids, initial)
        _, final = call_op(op, config, *given, length=LENGTH, implementation=implementation)
        ends = (0, *CUTS, LENGTH)
        decay, state = piece(*ends[:2])
        for start, stop in itertools.pairwise(ends[1:]):
            more, added = piece(start, stop)
            decay, state = apply(more, decay), added + apply(more, state)
        return final, piece(0, LENGTH), (decay, state)

    ids = jnp.asarray(IDS) if packed else None
    return jax.tree.map(np.asarray, jax.jit(everything)(timed, ids, initial))


def check(name, implementation, packed):
    initial = CASES[name][-1]
    final, (decay, state), fold = measure(name, implementation, packed)
    tolerance = testing.FLOAT32_TOLERANCE
    testing.assert_close(state + apply(jnp.asarray(decay), initial), final, tolerance)
    testing.assert_close((decay, state), fold, tolerance)


@pytest.mark.full(
    "xla-delta_rule, key-False",
    "xla-delta_rule, head-False",
    "xla-delta_rule, head-True",
    "xla-diagonal_ssm-False",
    "xla-linear_attention, key-False",
    "xla-linear_attention, head-True",
    "xla-linear_attention, head-False",
    "xla-linear_scan-False",
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", one_of_many(["reference", "xla"], ["xla"]))
def test_a_row_is_the_fold_of_its_pieces(implementation, name, packed):
    check(name, implementation, packed)


@pytest.mark.full("delta_rule, head-gpu")
@pytest.mark.parametrize(
    ("name", "implementation"),
    one_of_many(
        [(name, implementation) for name in PALLAS for implementation in ("tpu", "gpu")],
        [("linear_scan", "tpu"), ("delta_rule, head", "gpu")],
    ),
)
def test_a_row_is_the_fold_of_its_pieces_in_kernels(implementation, name):
    with testing.interpret():
        check(name, implementation, packed=True)


def test_a_document_that_begins_inside_forgets_what_enters():
    _, (decay, _), _ = measure("linear_attention, head", "xla", packed=True)
    assert (decay[0] == 0).all()
    assert (decay[1] > 0).all()


def cost(name, fn):
    """Flops, and loops, of `fn` of a case's arrays, 256 tokens, compiled. A loop counts once."""
    op, config, timed, fixed, initial = CASES[name]

    def struct(x, *sizes):
        return None if x is None else jax.ShapeDtypeStruct(sizes or x.shape, x.dtype)

    order = {i: struct(x, BATCH, 256, *x.shape[2:]) for i, x in timed.items()}
    order |= {i: struct(x) for i, x in fixed.items()}
    arrays = [order[i] for i in sorted(order)]
    run = jax.jit(functools.partial(fn, op, config), compiler_options=testing.QUICK)
    compiled = run.lower(*arrays, struct(initial), None).compile()
    return compiled.cost_analysis()["flops"], compiled.as_text().count(" while(")


def whole(*args):
    return call_op(*args, length=256, implementation="xla")


def in_short(*args):
    return summarize(*args, implementation="xla")


@pytest.mark.parametrize(
    ("name", "most"),
    one_of_many(
        [
            ("selective_scan", 0.7),
            ("diagonal_ssm", 0.25),
            ("linear_attention, head", 0.1),
            ("linear_attention, key", 0.2),
            ("delta_rule, head", 1.1),  # what it does not do is as much as the matrix it carries
        ],
        [("linear_attention, head", 0.1), ("delta_rule, head", 1.1)],
    ),
)
def test_a_summary_computes_no_outputs(name, most):
    (flops, _), (of_all, _) = cost(name, in_short), cost(name, whole)
    assert flops < most * of_all


def test_the_summary_of_a_scan_lacks_the_loop_that_writes():
    (_, loops), (_, of_all) = cost("linear_scan", in_short), cost("linear_scan", whole)
    assert loops == of_all - 1


@pytest.mark.full
def test_a_delta_rule_whose_columns_do_not_fit_sums_itself_up_in_two_passes():
    op, config, timed, *_ = CASES["delta_rule, head"]
    wide = normal(BATCH, LENGTH, 2, 253) / 16
    given = {**timed, 2: wide}
    narrow = {**timed, 2: wide[..., :3]}
    results = []
    for order, size, ways in ((given, 253, "two passes"), (narrow, 3, "one pass")):
        arrays = [order[i] for i in sorted(order)]
        run = functools.partial(summarize, op, config, implementation="xla")
        state = jnp.zeros((BATCH, 2, 4, size))
        chosen = dispatch.explain(run, *arrays, state, None)
        assert {c.implementation for c in chosen if c.op == "delta_rule summary"} == {ways}
        results.append(jax.jit(run)(*arrays, state, None))
    (decay, state), expected = results
    testing.assert_close((decay, state[..., :3]), expected, testing.FLOAT32_TOLERANCE)
