"""One mixer of each kind through interpreted TPU and GPU kernels, and on eight devices.

With documents, padding, a carried state and every gradient, as in the mixers' contract.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pallas_kernels import explain
from pallas_kernels.common import dispatch
from pallas_kernels.tools import testing
from seqmodels.parallel import batch_sharding, make_mesh, on_mesh, replicated
from tests import tolerances
from tests.seqmodels.mixers import calls
from tests.tiers import one_of_many

# The ops of each mixer, every kernel once.
KINDS = {
    "lru": {"linear_scan"},
    "mamba": {"selective_scan", "causal_conv1d"},
    "s4d": {"diagonal_ssm"},
    "gla": {"linear_attention"},
    "gated_deltanet": {"delta_rule", "causal_conv1d"},
    "rat": {"linear_scan", "checkpoint_attention"},
}
# Every backend and eight devices once each time; the rest in `test-all`.
ALWAYS = {"tpu": {"lru"}, "gpu": {"lru"}, "devices": {"gla"}}
# Of the rows of `calls`, tokens that go on with a document, and of which some begin one.
PART = slice(120, 141)


def arguments(case, rows):
    """Those of ``calls.both_ways``; rows go on with the document of the state, or are padding."""
    state = calls.entered(case)
    ids = calls.ids_of(calls.DOCUMENTS)[:, PART]
    state = dataclasses.replace(state, segment=np.array([2, 3, 5], np.int32))
    x, ids, state = jax.tree.map(
        lambda z: np.resize(z, (rows, *z.shape[1:])), (calls.inputs()[:, PART], ids, state)
    )
    return calls.parameters(case), x, ids, state, np.float32(1)


def assert_close(actual, expected):
    values = [(x.y, x.state) for x in (actual, expected)]
    testing.assert_close(*values, tolerances.FLOAT32)
    gradients = [x.gradients for x in (actual, expected)]
    testing.assert_close(*gradients, tolerances.FLOAT32_MIXER_GRADIENTS)


def taken(case, args):
    """What runs on the platform of each kernel, by op."""
    choices = explain(functools.partial(calls.both_ways, case), *args)
    return {(c.op, c.implementation) for c in choices if c.platform == "cpu"}


@pytest.mark.parametrize(
    ("case", "backend"),
    one_of_many(
        [(case, backend) for case in KINDS for backend in ("tpu", "gpu")],
        [(case, backend) for backend in ("tpu", "gpu") for case in ALWAYS[backend]],
    ),
)
def test_interpreted_kernels(case, backend):
    args = arguments(case, 3)
    with testing.interpret():
        actual = calls.program(case, implementation=backend)(*args)
        with dispatch.preferring(backend):
            assert {(op, backend) for op in KINDS[case]} <= taken(case, args)
    assert_close(actual, calls.program(case, implementation="reference")(*args))


@pytest.mark.parametrize("case", one_of_many(KINDS, ALWAYS["devices"]))
def test_eight_devices(case):
    mesh, args = make_mesh(), arguments(case, 8)
    assert mesh.shape["data"] == 8
    by_rows, whole = batch_sharding(mesh), replicated(mesh)
    split = jax.jit(
        on_mesh(functools.partial(calls.both_ways, case), mesh),
        in_shardings=(whole, by_rows, by_rows, by_rows, whole),
    )
    actual = split(*args)
    assert actual.y.sharding.is_equivalent_to(by_rows, 3)
    assert_close(jax.device_get(actual), calls.program(case)(*args))
