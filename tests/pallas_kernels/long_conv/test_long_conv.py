"""The op against its sequential oracle: both methods and the reference, one body of tests."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

import pallas_kernels
from pallas_kernels import long_conv
from pallas_kernels.long_conv import blocked, fft, spectrum
from pallas_kernels.long_conv.shapes import SHAPES, Shape, case, named
from pallas_kernels.tools import aot, testing
from pallas_kernels.tools.programs import program
from tests import tolerances
from tests.arrays import ones
from tests.tiers import compiled_as_users, one_of_many

METHODS = ("fft", "blocked")


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def arguments(
    length, kernel_size, kernel_size_reverse=0, *, batch=2, width=3, dtype="float32", seed=0
):
    """Random `(u, kernel[, kernel_reverse])` and a cotangent."""
    rng = np.random.default_rng(seed)
    wide = "float64" if dtype == "float64" else "float32"

    def normal(dtype, *shape):
        return jnp.asarray(rng.standard_normal(shape).astype(dtype))

    args = [normal(dtype, batch, length, width), normal(wide, width, kernel_size)]
    if kernel_size_reverse:
        args.append(normal(wide, width, kernel_size_reverse))
    return args, normal(dtype, batch, length, width)


def run(args, cotangent, **options):
    return testing.program(_conv, **options)(tuple(args), {}, cotangent)


def _conv(u, kernel, kernel_reverse=None, **options):
    return long_conv(u, kernel, kernel_reverse=kernel_reverse, **options)


def oracle(args, cotangent):
    """The same numbers through the sequential reference in double precision."""
    with jax.enable_x64(True):
        args, cotangent = testing.doubled((tuple(args), cotangent))
        run = testing.oracle(_conv, implementation="reference")
        return jax.tree.map(np.asarray, run(args, {}, cotangent))


# Filters of one tap, shorter than the row, as long, longer; one side longer than the other.
KINDS = [
    (1, 1, 0),
    (1, 7, 3),
    (2, 2, 2),
    (15, 40, 3),
    (63, 63, 63),
    (65, 9, 100),
    (65, 65, 0),
    (1000, 1000, 999),
    (1000, 1, 0),
]


@pytest.mark.parametrize(
    ("length", "kernel_size", "kernel_size_reverse"),
    compiled_as_users(KINDS, lambda length, *sizes: sizes[1] >= 100),
)
@pytest.mark.parametrize("method", METHODS)
def test_methods_equal_the_oracle(method, length, kernel_size, kernel_size_reverse):
    case = arguments(length, kernel_size, kernel_size_reverse)
    actual = run(*case, method=method)
    testing.assert_close(
        actual, expected(length, kernel_size, kernel_size_reverse), testing.FLOAT32_TOLERANCE
    )


@functools.cache
def expected(*sizes):
    return oracle(*arguments(*sizes))


@pytest.mark.parametrize("method", METHODS)
def test_double_precision_is_kept(method):
    with jax.enable_x64(True):
        case = arguments(70, 50, 80, dtype="float64")
        actual = run(*case, method=method)
        assert {x.dtype.name for x in jax.tree.leaves(actual)} == {"float64"}
        wanted = run(*case, implementation="reference")
        testing.assert_close(actual, wanted, testing.FLOAT64_TOLERANCE)


def test_the_oracle_is_the_sum():
    (u, kernel, behind), _ = arguments(9, 4, 12)
    u, kernel, behind = (np.asarray(x, np.float64) for x in (u, kernel, behind))
    wanted = np.zeros_like(u)
    for t in range(9):
        for s in range(9):
            d = t - s
            if 0 <= d < 4:
                wanted[:, t] += kernel[:, d] * u[:, s]
            elif -12 <= d < 0:
                wanted[:, t] += behind[:, -d - 1] * u[:, s]
    actual = long_conv(
        jnp.asarray(u, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
        kernel_reverse=jnp.asarray(behind, jnp.float32),
        implementation="reference",
    )
    testing.assert_close(actual, wanted, testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("kernel_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_against_the_float32_oracle(method, kernel_dtype):
    args, cotangent = arguments(100, 90, 30, dtype="bfloat16")
    args[1:] = [x.astype(kernel_dtype) for x in args[1:]]
    actual = run(args, cotangent, method=method)
    dtypes = [x.dtype.name for x in actual["gradients"]]
    assert dtypes == ["bfloat16", kernel_dtype, kernel_dtype]
    assert actual["outputs"].dtype == jnp.bfloat16
    testing.assert_close(actual, oracle(args, cotangent), testing.BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_filters_of_float32_tokens(method):
    args, cotangent = arguments(33, 20)
    args[1] = args[1].astype(jnp.bfloat16)
    actual = run(args, cotangent, method=method)
    assert actual["outputs"].dtype == jnp.float32
    wanted = oracle(args, cotangent)
    testing.assert_close(actual["outputs"], wanted["outputs"], testing.FLOAT32_TOLERANCE)
    testing.assert_close(actual["gradients"][0], wanted["gradients"][0], testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_later_tokens_reach_only_through_the_reverse_filter(method):
    """One token alone: its own output is the first tap, the one before it the first from behind."""
    u = np.eye(6, dtype=np.float32)[None, 3, :, None]
    kernel, behind = np.float32([[2.0, 3.0, 5.0]]), np.float32([[7.0, 11.0]])
    y = jax.jit(functools.partial(long_conv, method=method))(u, kernel, kernel_reverse=behind)
    np.testing.assert_allclose(y[0, :, 0], [0, 11, 7, 2, 3, 5], **tolerances.EACH_FLOAT32_OUTPUT)


@pytest.mark.parametrize("method", METHODS)
def test_taps_that_meet_no_token_get_no_gradient(method):
    args, cotangent = arguments(5, 9, 8)
    _, dkernel, dbehind = run(args, cotangent, method=method)["gradients"]
    np.testing.assert_array_equal(dkernel[:, 5:], 0)
    np.testing.assert_array_equal(dbehind[:, 4:], 0)
    assert np.all(np.abs(dkernel[:, :5]) > 0)
    assert np.all(np.abs(dbehind[:, :4]) > 0)


@pytest.mark.full
@hypothesis.given(
    length=strategies.sampled_from([3, 40]),
    kernel_size=strategies.sampled_from([1, 17, 64]),
    kernel_size_reverse=strategies.sampled_from([0, 2, 50]),
    method=strategies.sampled_from(METHODS),
    seed=strategies.integers(0, 3),
)
@hypothesis.settings(max_examples=10)
def test_any_lengths(length, kernel_size, kernel_size_reverse, method, seed):
    case = arguments(length, kernel_size, kernel_size_reverse, batch=1, width=2, seed=seed)
    testing.assert_close(run(*case, method=method), oracle(*case), testing.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_twice_is_bitwise_equal(method):
    case = arguments(65, 65, 10)
    once, twice = run(*case, method=method), run(*case, method=method)
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("method", [None, *METHODS])
def test_vmap_equals_folding_into_the_batch(method):
    (u, kernel, behind), _ = arguments(20, 20, 5, batch=6)

    def gradients(u):
        def loss(*args):
            return jnp.sum(
                jnp.sin(long_conv(args[0], args[1], kernel_reverse=args[2], method=method))
            )

        return jax.grad(loss, (0, 1, 2))(u, kernel, behind)

    folded = jax.jit(gradients)(u)
    du, dkernel, dbehind = jax.jit(jax.vmap(gradients))(u.reshape(3, 2, 20, 3))
    mapped = (du.reshape(u.shape), dkernel.sum(0), dbehind.sum(0))
    testing.assert_close(mapped, folded, testing.FLOAT32_TOLERANCE)


def test_the_reference_has_second_derivatives_and_forward_mode():
    (u, kernel), _ = arguments(6, 6)

    def loss(kernel):
        return jnp.sum(long_conv(u, kernel, implementation="reference") ** 2)

    gradient = jax.jit(jax.grad(loss))
    _, curvature = jax.jvp(gradient, (kernel,), (kernel,))
    testing.assert_close(curvature, gradient(kernel), testing.FLOAT32_TOLERANCE)


BAD = [
    ({"u": ones((2, 5))}, r"u must be \(B, L, H\), got shape \(2, 5\)"),
    ({"u": ones((2, 0, 3))}, "u must not be empty"),
    ({"u": ones((2, 5, 3), jnp.float16)}, "u must be float32 or bfloat16 or float64"),
    ({"kernel": ones((5, 3))}, r"kernel must be \(H, any\) = \(3, 'any'\)"),
    ({"kernel": ones((3, 0))}, "kernel must have at least one tap"),
    ({"kernel": ones((3, 4), jnp.int32)}, "kernel must be float32 or bfloat16 since u is"),
    ({"kernel_reverse": ones((4, 5))}, r"kernel_reverse must be \(H, any\)"),
    ({"kernel_reverse": ones((3, 0))}, "kernel_reverse must have at least one tap"),
    ({"kernel_reverse": ones((3, 2), jnp.float16)}, "kernel_reverse must be float32 or"),
    ({"method": "direct"}, "method='direct'; choose among fft, blocked"),
    ({"implementation": "cuda"}, "choose among reference, xla"),
]
GOOD = {"u": ones((2, 5, 3)), "kernel": ones((3, 4))}


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        long_conv(**(GOOD | changed))


def test_explain_says_that_there_is_no_kernel():
    choices = pallas_kernels.explain(long_conv, **GOOD)
    choices = {c.platform: c for c in choices if c.op == "long_conv"}
    assert {c.implementation for c in choices.values()} == {"xla"}
    assert "no Pallas kernel: method 'blocked' is matrix products" in str(choices["tpu"])
    assert "no Pallas kernel: method 'fft'" in str(choices["cuda"])
    for name in ("tpu", "gpu"):
        with pytest.raises(NotImplementedError, match="it has no Pallas kernel"):
            long_conv(**GOOD, implementation=name)


@pytest.mark.full
@pytest.mark.parametrize("mode", one_of_many(["forward", "forward+backward"], ["forward+backward"]))
def test_a_tpu_gets_matrix_products_and_no_transform(mode):
    shape = Shape("text", "S4", 2, 1024, 128, two_sided=True)
    text = aot.compile_for("v5e", *case(shape, "xla", mode)).as_text() or ""
    assert "convolution" in text
    assert "fft(" not in text


def test_a_gradient_takes_two_transforms_of_the_tokens_each_way():
    """And one of the filter each way: nothing is transformed twice."""
    fn, operands = program(
        functools.partial(long_conv, method="fft"), named("odd"), "forward+backward"
    )
    assert str(jax.make_jaxpr(fn)(*operands)).count("= fft[") == 6


@pytest.mark.parametrize("least", [1, 2, 3, 100, 2048, 2049, 100_000])
def test_fast_sizes_hold_what_they_must_and_factor_into_small_primes(least):
    size = fft.size(least)
    assert least <= size <= max(1.35 * least, 2)
    while size % 2 == 0:
        size //= 2
    assert size in (1, 3, 5)


@pytest.mark.parametrize("least", [1, 2, 16, 17, 130, 2047, 32767, 131071])
def test_factors_hold_little_more_than_they_must(least):
    rows, columns = blocked.factors(least)
    assert least <= rows * columns <= least + 2 * columns
    assert rows % 2 == 0
    assert columns == 1 or columns % 8 == 0
    assert rows + 4 * columns <= 5 * np.sqrt(least) + 40


@pytest.mark.parametrize("least", [5, 50, 333])
def test_a_blocked_spectrum_is_the_transform(least):
    transform = blocked.plan(least, jnp.dtype("float32"))
    n, (rows, columns) = transform.size, blocked.factors(least)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, n, 3)), jnp.float32)
    real, imaginary = np.moveaxis(jax.jit(transform.forward)(x), 2, 0)
    p, q = np.arange(rows // 2 + 1)[:, None], np.arange(columns)[None]
    wanted = np.fft.fft(np.asarray(x, np.float64), axis=1)[:, p + rows * q]
    actual = np.asarray(real) + 1j * np.asarray(imaginary)
    testing.assert_close(actual, wanted, testing.FLOAT32_TOLERANCE)
    testing.assert_close(transform.inverse(transform.forward(x), n), x, testing.FLOAT32_TOLERANCE)


def test_the_two_sides_meet_in_a_circle_one_shorter():
    """`needed` is tight: in a circle with a place less the farthest taps wrap around."""
    (u, kernel, behind), _ = arguments(6, 6, 5, batch=1, width=1)
    n = spectrum.needed(6, 6, 5)
    assert n == 11

    def circular(n):
        circle = np.zeros(n)
        circle[:6] += np.asarray(kernel[0])
        circle[n - 5 :] += np.asarray(behind[0])[::-1]
        product = np.fft.fft(np.asarray(u[0, :, 0]), n) * np.fft.fft(circle)
        return np.fft.ifft(product).real[:6]

    y = long_conv(u, kernel, kernel_reverse=behind, implementation="reference")[0, :, 0]
    testing.assert_close(circular(n), y, testing.FLOAT32_TOLERANCE)
    assert testing.rmse_ratio(circular(n - 1), y) > 0.01


def test_scaled_shape_keeps_all_but_the_length():
    shape = named("s4-text").scaled(0.5)
    assert (shape.batch, shape.length, shape.width, shape.two_sided) == (16, 2048, 256, True)
    assert set(SHAPES) >= {"s4-text", "hyena-153m", "odd"}


@pytest.mark.parametrize(
    ("arguments_", "message"),
    [(("gpt", "xla"), "shape='gpt'"), (("short", "xla", "sideways"), "mode='sideways'")],
)
def test_unknown_case(arguments_, message):
    with pytest.raises(ValueError, match=message):
        case(*arguments_)
