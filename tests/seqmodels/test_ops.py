"""Kernels inside a program that is split over devices by rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("packed", [False, True])
def test_eight_devices_equal_one(packed):
    mesh = make_mesh()
    assert mesh.shape["data"] == 8
    args = arguments()
    args = args if packed else (*args[:3], None)
    gradient = jax.value_and_grad(loss, (0, 1, 2))
    split = jax.jit(on_mesh(gradient, mesh), in_shardings=shardings(mesh))
    actual = split(*args)
    testing.assert_close(actual, gradient(*args), testing.FLOAT32_TOLERANCE)
    assert actual[1][1].sharding.is_equivalent_to(batch_sharding(mesh), 3)


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
