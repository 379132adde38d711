"""Products of groups of rows, against a loop over the groups in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import explain
from pallas_kernels.tools import testing
from seqmodels.layers import grouped
from seqmodels.parallel.mesh import make_mesh, on_mesh
from tests import tolerances

SIZES = {
    "uneven": (3, 0, 130, 1, 66),
    "one group": (0, 40, 0),
    "fewer rows than groups": (0, 1, 0, 0, 2, 0, 0, 1),
    "whole tiles": (128, 128),
}


def expected(x, kernels, sizes, dy):
    """``y, dx, dkernels``."""
    x, kernels, dy = (np.asarray(a, np.float64) for a in (x, kernels, dy))
    group = np.repeat(np.arange(len(sizes)), sizes)
    y = np.stack([row @ kernels[e] for row, e in zip(x, group, strict=True)])
    dx = np.stack([kernels[e] @ row for row, e in zip(dy, group, strict=True)])
    dkernels = np.zeros_like(kernels)
    for a, b, e in zip(x, dy, group, strict=True):
        dkernels[e] += np.outer(a, b)
    return y, dx, dkernels


@jax.jit
def found(x, kernels, sizes, dy):
    y, pull = jax.vjp(lambda *given: grouped.grouped_dot(*given, sizes), x, kernels)
    return y, *pull(dy)


def drawn(sizes, dtype):
    rng = np.random.default_rng(0)
    rows = sum(sizes)
    shapes = ((rows, 6), (len(sizes), 6, 5), (rows, 5))
    x, kernels, dy = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
    return x, kernels, np.array(sizes, np.int32), dy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_each_row_meets_the_matrix_of_its_group(sizes, dtype):
    given = drawn(sizes, dtype)
    bound = testing.FLOAT32_TOLERANCE if dtype == "float32" else testing.BFLOAT16_TOLERANCE
    testing.assert_close(found(*given), expected(*given), bound)


def test_a_row_that_is_not_finite_stays_in_its_group():
    x, kernels, sizes, dy = drawn((3, 2, 6), "float32")
    x[3] = np.inf
    y, dx, dkernels = found(x, kernels, sizes, dy)
    assert np.isfinite(np.delete(y, 3, axis=0)).all()
    assert np.isfinite(dx).all()
    assert np.isfinite(np.delete(dkernels, 1, axis=0)).all()


def test_what_runs_where():
    given = jax.tree.map(jnp.asarray, drawn((3, 2), "float32")[:3])
    choices = {c.platform: c.implementation for c in explain(grouped.grouped_dot, *given)}
    assert choices["cpu"] == "tiles"
    assert choices["tpu"] == choices["cuda"] == "ragged_dot"
    split = on_mesh(grouped.grouped_dot, make_mesh(data=2, devices=jax.devices()[:2]))
    assert {c.implementation for c in explain(split, *given)} == {"ragged_dot"}
    np.testing.assert_allclose(
        jax.jit(split)(*given), jax.jit(grouped.grouped_dot)(*given),
        **tolerances.EACH_FLOAT32_SUM,
    )  # fmt: skip
