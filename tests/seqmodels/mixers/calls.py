"""One call of a mixer with all that it takes, and its gradients, as one program.

Rows are longer than three chunks of every portable kernel, and their thirds longer than one. The
mixer runs as users get it, or by the implementation that a test prefers. Whoever calls a program
again with other values compiles nothing, so that most checks cost only the time of a call.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import dispatch
from seqmodels.mixers import Segments, build
from tests.seqmodels.mixers.cases import CASES

WIDTH, PIECE = 16, 67
LENGTH = 3 * PIECE

# Documents of each row, `(id, begin, end)`; the last row is padding. Of the two cuts into thirds
# one is where a document begins, the other one token later; 129 is beside a chunk's boundary.
DOCUMENTS = (
    ((1, 0, 67), (2, 67, 133), (1, 133, 190)),
    ((3, 0, 129), (4, 129, LENGTH)),
    (),
)
# One document a row, what mixers that do not pack are given.
ALONE = (((1, 0, 190),), ((4, 0, LENGTH),), ())
# What comes before: row 0 of `DOCUMENTS` goes on with its document, row 1 begins another.
BEFORE = tuple(((name, 0, LENGTH),) for name in (1, 8, 5))
SHORT = np.zeros((1, 2, WIDTH), np.float32)


def ids_of(documents):
    """Segment ids `(B, L)` int32."""
    ids = np.zeros((len(documents), LENGTH), np.int32)
    for row, names in zip(ids, documents, strict=True):
        for name, begin, end in names:
            row[begin:end] = name
    return ids


@functools.cache
def mixer_of(case):
    return build(CASES[case], WIDTH)


def documents_of(case):
    """The rows of a case: several documents each if the mixer takes them."""
    return DOCUMENTS if mixer_of(case).supports_packing else ALONE


@functools.cache
def parameters(case):
    return jax.jit(mixer_of(case).init)(jax.random.key(0), SHORT)["params"]


@functools.cache
def abstract_parameters(case):
    """Their shapes, for calls that compute nothing."""
    return jax.eval_shape(mixer_of(case).init, jax.random.key(0), SHORT)["params"]


def inputs(seed=1, dtype="float32"):
    """`(B, L, D)`, numbers that bfloat16 has too."""
    x = jax.random.normal(jax.random.key(seed), (len(DOCUMENTS), LENGTH, WIDTH))
    return np.array(x.astype(jnp.bfloat16).astype(dtype))


def start(case, dtype="float32"):
    """The state before the first token; None where there is none."""
    mixer = mixer_of(case)
    if not mixer.stateful:
        return None
    return mixer.initial_state(len(DOCUMENTS), max_length=2 * LENGTH, dtype=jnp.dtype(dtype))


@dataclasses.dataclass
class Result:
    """``y``, the state after it, and gradients of parameters, input and initial state."""

    y: Any
    state: Any
    gradients: Any = None


jax.tree_util.register_dataclass(Result, ["y", "state", "gradients"], [])


def forward(case, params, x, ids=None, state=None, *, single=None) -> Result:
    """``single`` None: as the mixer needs it; no documents at all where ``ids`` is None."""
    mixer = mixer_of(case)
    single = not mixer.supports_packing if single is None else single
    segments = None if ids is None else Segments.from_ids(ids, single=single)
    return Result(*mixer.apply({"params": params}, x, segments=segments, state=state))


def both_ways(case, params, x, ids, state, share, *, single=None) -> Result:
    """``forward``, and gradients through the outputs and, by a factor ``share``, the last state."""

    def loss(params, x, kept):
        entering = None if state is None else dataclasses.replace(state, state=kept)
        result = forward(case, params, x, ids, entering, single=single)
        after = None if result.state is None else result.state.state
        return _weighed(result.y) + share * _weighed(after), result

    kept = None if state is None else state.state
    derivative = jax.grad(loss, (0, 1, 2), has_aux=True, allow_int=True)
    gradients, result = jax.tree.map(_number, derivative(params, x, kept))
    result.gradients = dict(zip(("params", "x", "state"), gradients, strict=True))
    return result


def _number(x):
    """The gradient of an integer, such as a position, as a number."""
    return jnp.zeros(x.shape, jnp.float32) if x.dtype == jax.dtypes.float0 else x


def _weighed(tree):
    """A sum of all numbers of ``tree`` in which each has another weight, in every row the same."""
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        weights = jnp.cos(jnp.arange(leaf[0].size, dtype=jnp.float32)).reshape(leaf[0].shape)
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            total += jnp.sum(part.astype(jnp.float32) * weights[None])
    return total


@functools.cache
def program(case, call=both_ways, *, implementation=None, single=None):
    """``call`` of one mixer, jitted; every implementation has programs of its own."""
    jitted = jax.jit(functools.partial(call, case, single=single))

    def run(*args) -> Result:
        prefer = contextlib.nullcontext()
        if implementation is not None:
            prefer = dispatch.preferring(implementation)
        with prefer:
            return jax.device_get(jitted(*args))

    return run


@functools.cache
def entered(case, implementation=None, dtype="float32"):
    """The state that enters ``whole``."""
    if not mixer_of(case).stateful:
        return None
    run = program(case, implementation=implementation)
    x = inputs(2, dtype)
    return run(parameters(case), x, ids_of(BEFORE), start(case, dtype), np.float32(1)).state


@functools.cache
def whole(case, implementation=None, dtype="float32") -> Result:
    """A call with everything: documents, padding, a carried state, all gradients."""
    run = program(case, implementation=implementation)
    state = entered(case, implementation, dtype)
    ids = ids_of(documents_of(case))
    return run(parameters(case), inputs(dtype=dtype), ids, state, np.float32(1))


def in_pieces(case, x, ids, state, cuts):
    """Outputs and last state when the rows are fed in pieces that end at ``cuts``."""
    params, run, outputs = parameters(case), program(case, forward), []
    for begin, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        result = run(params, x[:, begin:end], ids[:, begin:end], state)
        outputs.append(result.y)
        state = result.state
    return np.concatenate(outputs, axis=1), state
