"""Fingerprints of programs: names do not count, everything that is compiled does."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.tools.programs import fingerprint

X = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def _program(factor, kernel_name, name):
    def kernel(x_ref, y_ref):
        y_ref[...] = factor * x_ref[...]

    @jax.jit
    def inner(x):
        return pl.pallas_call(kernel, out_shape=X, name=kernel_name)(x)

    inner.__name__ = name
    return lambda x: inner(x) + 1


def test_names_of_kernels_and_functions_do_not_count():
    assert fingerprint(_program(2.0, "a", "f"), X) == fingerprint(_program(2.0, "b", "g"), X)


@pytest.mark.parametrize(
    "other",
    [_program(3.0, "a", "f"), lambda x: _program(2.0, "a", "f")(x) + 1],
    ids=["inside of a kernel", "around a kernel"],
)
def test_what_is_compiled_counts(other):
    assert fingerprint(other, X) != fingerprint(_program(2.0, "a", "f"), X)


def test_shapes_count():
    wider = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    assert fingerprint(jnp.sin, wider) != fingerprint(jnp.sin, X)


def test_another_jax_compiles_another_program(monkeypatch):
    before = fingerprint(jnp.sin, X)
    monkeypatch.setattr(jax, "__version__", "another")
    assert fingerprint(jnp.sin, X) != before
