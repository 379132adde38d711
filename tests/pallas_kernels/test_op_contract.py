"""What every op promises, whatever it computes: one body for all families."""

import functools
import inspect

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import explain
from pallas_kernels.common import dispatch
from pallas_kernels.tools import operands, testing
from pallas_kernels.tools.families import FAMILIES
from tests.tiers import one_of_many

PORTABLE, PALLAS = ("reference", "xla"), ("tpu", "gpu")
WITH_KERNELS = [name for name, family in FAMILIES.items() if family.has_kernels]
each_family = pytest.mark.parametrize("name", FAMILIES)
each_portable = pytest.mark.parametrize("implementation", PORTABLE)


@functools.cache
def program(name, implementation):
    """The op over several documents a row, jitted; one for all tests, so that it compiles once."""
    return jax.jit(operands.call(name, implementation))


@pytest.fixture(scope="module", autouse=True)
def _forget():
    yield
    program.cache_clear()


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def doubled(args):
    """The operands in double precision; inside `jax.enable_x64`."""
    return {name: x.astype("complex128" if x.dtype.kind == "c" else "float64")
            for name, x in args.items()}  # fmt: skip


def one_token(name):
    """The operands of rows of one token."""
    cut = operands.LENGTH
    return {
        operand: x[:, :1] if "B" in operands.OPS[name][operand] and x.shape[1] == cut else x
        for operand, x in operands.arrays(name, 2).items()
    }


def test_every_op_is_a_family_with_a_small_call():
    ops = {
        name for name in pallas_kernels.__all__ if name not in ("checked", "explain", "segments")
    }
    assert ops == set(FAMILIES) == set(operands.OPS)


@each_family
def test_a_family_describes_its_op(name):
    family = FAMILIES[name]
    assert family.op is getattr(pallas_kernels, name)
    assert family.contract.backends.keys() == {*PORTABLE, *PALLAS}
    assert set(family.representatives) <= set(family.shapes)
    for shape_name, shape in family.shapes.items():
        assert (shape.name, min(shape.batch, shape.length) > 0) == (shape_name, True)
        arguments = inspect.signature(family.op).parameters
        assert {*shape.operands(), *shape.options()} <= set(arguments)


@each_family
def test_the_signature_has_the_words_of_all_ops(name):
    parameters = inspect.signature(FAMILIES[name].op).parameters
    *_, last = parameters.values()
    assert (last.name, last.default) == ("implementation", None)
    for argument in ("initial_state", "segment_ids", "reverse", "implementation"):
        if argument in parameters:
            assert parameters[argument].kind == inspect.Parameter.KEYWORD_ONLY
            assert not parameters[argument].default
    documented = inspect.getdoc(FAMILIES[name].op) or ""
    for argument in set(parameters) - {"past_v", "past_k", "v", "k"}:  # named in one line
        assert f"{argument}: " in documented or f"{argument}, " in documented, argument


@each_family
def test_the_signature_has_the_shapes_of_a_call(name, monkeypatch):
    """No type is checked where ops run: here is where the annotations are held to what they say."""
    op = jaxtyping.jaxtyped(FAMILIES[name].op, typechecker=beartype.beartype)
    monkeypatch.setattr(pallas_kernels, name, op)
    args = operands.arrays(name, 2)
    jax.eval_shape(operands.call(name), args)
    for operand in args:
        with pytest.raises(jaxtyping.TypeCheckError, match=rf"parameter '{operand}'"):
            jax.eval_shape(operands.call(name), args | {operand: args[operand][None, None, None]})


@each_family
@pytest.mark.parametrize("wrong", ["cuda", ("xla", "pallas"), ()])
def test_implementations_are_names_of_its_own(name, wrong):
    args = operands.arrays(name, 1)
    with pytest.raises(
        ValueError, match=rf"{name}: implementation=.*; choose among reference, xla"
    ):
        operands.call(name, wrong)(args)


@each_family
def test_explain_lists_every_platform(name):
    choices = explain(operands.call(name), operands.arrays(name, 2))
    choices = {c.platform: c for c in choices if c.op == name}
    assert tuple(choices) == dispatch.PLATFORMS
    taken = {platform: choice.implementation for platform, choice in choices.items()}
    if FAMILIES[name].has_kernels:
        assert taken == {"cpu": "xla", "tpu": "tpu", "cuda": "gpu", "rocm": "xla"}
        assert "; not gpu: it does not run on rocm" in str(choices["rocm"])
    else:
        assert set(taken.values()) == {"xla"}
        assert {"tpu", "gpu"} == {*choices["tpu"].skipped, *choices["cuda"].skipped}
    for choice in choices.values():
        assert all(choice.skipped.values())


@each_family
@pytest.mark.parametrize("implementation", PALLAS)
def test_what_a_kernel_does_not_serve_is_refused_with_the_reason(name, implementation):
    reason = "no (float64|complex128); reference and xla do"
    if not FAMILIES[name].has_kernels:
        reason = "it has no Pallas kernel"
    with jax.enable_x64(True):
        args = doubled(operands.arrays(name, 2))
        for requested in (implementation, [implementation]):
            with pytest.raises(
                NotImplementedError, match=rf"{name}: .*{implementation}: .*{reason}"
            ):
                jax.eval_shape(operands.call(name, requested), args)
        for requested, segment_index in (
            ((implementation, "reference"), "reference"),
            (None, "xla"),
        ):
            choices = explain(operands.call(name, requested), args)
            assert {c.implementation for c in choices if c.op == name} == {segment_index}


@each_family
def test_double_precision_is_kept(name):
    with jax.enable_x64(True):
        args = doubled(operands.arrays(name, 2))
        expected, actual = (jax.jit(operands.call(name, i))(args) for i in PORTABLE)
        for leaf in jax.tree.leaves((expected, actual)):
            assert leaf.dtype in (jnp.float64, jnp.complex128)
        testing.assert_close(actual, expected, testing.FLOAT64_TOLERANCE)


@each_family
def test_the_portable_path_computes_what_the_reference_does(name):
    args = operands.arrays(name, 4)
    expected, actual = (program(name, i)(args) for i in PORTABLE)
    testing.assert_close(actual, expected, testing.FLOAT32_TOLERANCE)


@pytest.mark.full("xla-diagonal_ssm")
@each_family
@pytest.mark.parametrize("implementation", one_of_many(["reference", "xla"], ["xla"]))
def test_the_same_call_twice_is_bitwise_equal(name, implementation):
    args = operands.arrays(name, 4)
    once, twice = (program(name, implementation)(args) for _ in range(2))
    assert_same_bits(once, twice)


@pytest.mark.always("xla-linear_attention")
@each_family
@each_portable
def test_compiled_or_not_is_close(name, implementation):
    args = operands.arrays(name, 4)
    eager = operands.call(name, implementation)(args)
    testing.assert_close(eager, program(name, implementation)(args), testing.FLOAT32_TOLERANCE)


@each_family
@each_portable
def test_vmap_equals_folding_into_the_batch(name, implementation):
    args = jax.device_get(operands.arrays(name, 4))
    batched = {operand: "B" in sizes for operand, sizes in operands.OPS[name].items()}
    split = {n: x.reshape(2, 2, *x.shape[1:]) if batched[n] else x for n, x in args.items()}
    axes = {n: 0 if batched[n] else None for n in args}
    mapped = jax.jit(jax.vmap(operands.call(name, implementation), (axes,)))(split)
    mapped = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), jax.device_get(mapped))
    testing.assert_close(mapped, program(name, implementation)(args), testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.parametrize("name", one_of_many(WITH_KERNELS, ["linear_scan", "causal_conv1d"]))
def test_an_interpreted_kernel_computes_what_the_reference_does(name, implementation):
    args = operands.arrays(name, 2)
    with testing.interpret():
        once, twice = (jax.device_get(program(name, implementation)(args)) for _ in range(2))
    assert_same_bits(once, twice)
    testing.assert_close(once, program(name, "reference")(args), testing.FLOAT32_TOLERANCE)


@pytest.mark.full("s4_kernel")
@each_family
def test_one_token_takes_the_cheap_step(name):
    args = one_token(name)
    run = operands.call(name, packed=False, length=1)
    choices = [c for c in explain(run, args) if c.op == name]
    assert {c.implementation for c in choices} == {"xla"}
    text = str(jax.make_jaxpr(run)(args))
    assert not [p for p in ("scan", "while", "pallas_call", "fft") if f" {p}[" in text]
    expected = jax.jit(operands.call(name, "reference", packed=False, length=1))(args)
    testing.assert_close(jax.jit(run)(args), expected, testing.FLOAT32_TOLERANCE)
