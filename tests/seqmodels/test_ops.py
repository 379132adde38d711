"""Kernels inside a program that is split over devices by rows, and who calls them."""

import ast
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.checkpoint_attention import Cache
from pallas_kernels.tools import aot, testing
from seqmodels import ops
from seqmodels.parallel import batch_sharding, make_mesh, on_mesh, replicated
from seqmodels.segments import Segments


def loss(a, b, initial, ids):
    segments = None if ids is None else Segments.from_ids(ids)
    h, final = ops.linear_scan(a, b, initial_state=initial, segments=segments)
    return jnp.sum(h * h) + jnp.sum(final)


def arguments(rows=16, length=20, width=6):
    rng = np.random.default_rng(0)
    return (
        jnp.linspace(0.5, 0.9, width),
        jnp.asarray(rng.standard_normal((rows, length, width)), jnp.float32),
        jnp.asarray(rng.standard_normal((rows, width)), jnp.float32),
        jnp.asarray(testing.random_ids(rng, rows, length)),
    )


def shardings(mesh):
    rows = batch_sharding(mesh)
    return replicated(mesh), rows, rows, rows


@pytest.mark.always("True")
@pytest.mark.parametrize("packed", [False, True])
def test_eight_devices_equal_one(packed):
    mesh = make_mesh()
    assert mesh.shape["data"] == 8
    args = arguments()
    args = args if packed else (*args[:3], None)
    gradient = jax.value_and_grad(loss, (0, 1, 2))
    split = jax.jit(on_mesh(gradient, mesh), in_shardings=shardings(mesh))
    actual = split(*args)
    testing.assert_close(actual, jax.jit(gradient)(*args), testing.FLOAT32_TOLERANCE)
    assert actual[1][1].sharding.is_equivalent_to(batch_sharding(mesh), 3)


ROWS, LENGTH = 4, 7


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def c64(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.complex64)


def tokens(*shape):
    return f32(ROWS, LENGTH, *shape)


HEADS = {"q": tokens(2, 3), "k": tokens(2, 3), "v": tokens(6, 5)}
PAST = Cache(f32(ROWS, 2, 2, 3), f32(ROWS, 2, 2, 5), jax.ShapeDtypeStruct((ROWS,), jnp.int32))
CALLS = {
    "linear_scan": {"a": tokens(6), "b": tokens(6), "initial_state": f32(ROWS, 6)},
    "selective_scan": {
        "x": tokens(6), "dt": tokens(6), "A": f32(6, 2), "B": tokens(2), "C": tokens(2),
        "D": f32(6), "gate": tokens(6), "dt_bias": f32(6), "initial_state": f32(ROWS, 6, 2),
    },
    "diagonal_ssm": {
        "u": tokens(6), "log_a": c64(6, 2), "c": c64(6, 2), "initial_state": c64(ROWS, 6, 2),
    },
    "causal_conv1d": {
        "x": tokens(6), "weight": f32(3, 6), "bias": f32(6), "initial_state": f32(ROWS, 2, 6),
    },
    "linear_attention": {
        **HEADS, "log_decay": tokens(6, 3), "initial_state": f32(ROWS, 6, 3, 5),
    },
    "delta_rule": {
        **HEADS, "beta": tokens(6), "log_decay": tokens(6), "initial_state": f32(ROWS, 6, 3, 5),
    },
    "bidirectional_mimo_scan": {
        "u": tokens(6), "decay": c64(3), "input_projection": f32(6, 6),
        "output_projection": f32(12, 6),
    },
    "checkpoint_attention": {
        "q": tokens(6, 3), "k": tokens(2, 3), "v": tokens(2, 5), "cache": PAST,
    },
}  # fmt: skip
CONSTANT = {"linear_attention, one decay a head": {**HEADS, "log_decay": f32(6)}}
WHOLE_ROWS = {
    "long_conv": {"u": tokens(6), "kernel": f32(6, LENGTH), "kernel_reverse": f32(6, 3)},
}  # fmt: skip


@pytest.mark.parametrize("name", [*CALLS, *CONSTANT, *WHOLE_ROWS])
def test_every_op_is_split_by_rows(name):
    """Traced, with its gradient: a shape that is split and should not be does not fit."""
    arrays = (CALLS | CONSTANT | WHOLE_ROWS)[name]
    op = getattr(ops, name.partition(",")[0])
    if op is ops.checkpoint_attention:
        op = functools.partial(op, interval=3)
    op = functools.partial(op, implementation="reference")  # the fastest to trace

    def gradients(arrays, ids):
        segments = {} if name in WHOLE_ROWS else {"segments": Segments.from_ids(ids)}
        y, pullback = jax.vjp(lambda floats: op(**(arrays | floats), **segments), floats(arrays))
        return y, pullback(y)

    def floats(arrays):
        return {key: x for key, x in arrays.items() if key != "cache"}

    mesh = make_mesh(2, devices=jax.devices()[:2])
    arguments = arrays, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    whole = jax.make_jaxpr(gradients)(*arguments)
    split = jax.make_jaxpr(on_mesh(gradients, mesh))(*arguments)
    assert [x.shape for x in split.out_avals] == [x.shape for x in whole.out_avals]
    assert "shard_map" in str(split)
    assert "shard_map" not in str(whole)


def test_mixers_and_layers_call_kernels_through_ops_alone():
    kernels = set(pallas_kernels.__all__) - {"checked", "explain", "segments"}
    root = Path(ops.__file__).parent
    for path in (*root.glob("mixers/*.py"), *root.glob("layers/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pallas_"):
                assert not kernels & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Import):
                assert "pallas_kernels" not in {alias.name for alias in node.names}, path
            assert getattr(node, "attr", None) != "shard_map", path


def test_without_a_mesh_it_is_a_plain_call():
    args = arguments(rows=3)
    text = str(jax.make_jaxpr(loss)(*args))
    assert "shard_map" not in text


def test_tpu_kernels_compile_for_four_chips():
    mesh = make_mesh(devices=aot.topology("v5e").devices)
    assert mesh.shape["data"] == 4
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        for x, s in zip(arguments(), shardings(mesh), strict=True)
    ]
    program = jax.jit(on_mesh(jax.grad(loss, (0, 1, 2)), mesh)).lower(*args).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 2  # forward and backward
    assert program.count(" all-reduce(") == 1  # the gradient of the shared decay
    assert " all-gather(" not in program
