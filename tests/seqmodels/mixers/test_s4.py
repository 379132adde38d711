"""S4 against its recurrence in double precision; convolution and recurrence at Path-X's length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import s4_kernel
from seqmodels.mixers import S4Config, build, hippo
from seqmodels.mixers.s4 import Model, convolution, recurrence, truncated
from tests import tolerances
from tests.seqmodels.mixers.oracles import assert_close, fresh, initialised
from tests.tiers import one_of_many

WIDTH = 4


def pairs(parameter):
    return parameter[..., 0] + 1j * parameter[..., 1]


def discrete(step, values, p, b):
    """``Ā (N, N)`` and ``B̄ (N,)`` of one channel over all modes, by dense inverses."""
    values, p, b = (np.r_[x, np.conj(x)].astype(np.complex128) for x in (values, p, b))
    a = np.diag(values) - np.outer(p, p.conj())
    left = np.linalg.inv(np.eye(len(a)) - step / 2 * a)
    return left @ (np.eye(len(a)) + step / 2 * a), step * left @ b


def run(a, b, c, u):
    """``y_t = C x_t``, ``x_t = Ā x_{t-1} + B̄ u_t`` over a row of one channel."""
    x, y, c = np.zeros(len(b), np.complex128), [], np.r_[c, np.conj(c)]
    for token in u:
        x = a @ x + b * token
        y.append((c @ x).real)
    return np.array(y)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("n_ssm", [None, 2])
def test_recurrence_in_double_precision(bidirectional, n_ssm):
    config = S4Config(state_size=6, n_ssm=n_ssm, bidirectional=bidirectional, dt_min=0.02)
    p, x, y = initialised(config, WIDTH, 9)
    for channel in range(WIDTH):
        copy = channel % (n_ssm or WIDTH)
        values = -np.exp(p["log_A_real"][copy]) + 1j * p["A_imag"][copy]
        vectors = pairs(p["P"])[copy], pairs(p["B"])[copy]
        system = discrete(np.exp(p["log_dt"][channel]), values, *vectors)
        for u, out in zip(x[..., channel], y[..., channel], strict=True):
            left = pairs(p["C1" if bidirectional else "C"])[channel]
            expected = p["D"][channel] * u + run(*system, left, u)
            if bidirectional:  # the kernel from the right starts at the next token
                right = run(*system, pairs(p["C2"])[channel], u[::-1])[::-1]
                expected[:-1] += right[1:]
            assert_close(out, expected)


def legs(steps, states=64, seed=0):
    """HiPPO-LegS with a step size for each channel, in single precision."""
    rng = np.random.default_rng(seed)
    values, vectors = hippo.normal_eigen(states)
    parts = values, hippo.normal_low_rank(vectors), hippo.normal_input(vectors)
    c = rng.standard_normal((1, len(steps), states // 2, 2)) @ np.array([1, 1j]) / 2**0.5
    rows = (np.tile(x, (len(steps), 1)) for x in parts)
    arrays = (jnp.asarray(x, jnp.complex64) for x in (*rows, c))
    return Model(jnp.asarray(steps, jnp.float32), *arrays)


def test_initial_system_is_hippo_legs():
    p = fresh(S4Config(state_size=8), WIDTH)
    values = -np.exp(p["log_A_real"][0]) + 1j * p["A_imag"][0]
    _, vectors = hippo.normal_eigen(8)
    basis = np.concatenate([vectors, vectors.conj()], 1)
    low_rank = np.r_[pairs(p["P"])[0], pairs(p["P"])[0].conj()]
    a = np.diag(np.r_[values, values.conj()]) - np.outer(low_rank, low_rank.conj())
    n = np.arange(8)
    root = np.sqrt(2 * n + 1)
    wanted = -np.tril(np.outer(root, root), -1) - np.diag(n + 1)
    np.testing.assert_allclose(
        basis @ a @ basis.conj().T, wanted, **tolerances.EACH_FLOAT32_OUTPUTS
    )


STEPS = (1e-4, 1e-3, 1e-2, 1e-1)
LONG = 16384


@functools.cache
def at_length(length):
    """Outputs of both forms in float32 and of the recurrence in float64, ``(L, channels)``."""
    model = legs(STEPS)
    u = np.random.default_rng(1).standard_normal((1, length, len(STEPS))).astype(np.float32)
    convolved = jax.jit(convolution)(model, u)[0]
    recurred = jax.jit(lambda model, u: recurrence(model, u, None, None)[0])(model, u)[0]
    wanted = []
    for h in range(len(STEPS)):
        parts = (np.asarray(x[h], np.complex128) for x in (model.eigenvalues, model.p, model.b))
        system = discrete(float(model.step[h]), *parts)
        wanted.append(run(*system, np.asarray(model.c[0, h], np.complex128), u[0, :, h]))
    return np.asarray(convolved), np.asarray(recurred), np.stack(wanted, 1)


@pytest.mark.parametrize("length", one_of_many([2048, LONG], [2048]))
@pytest.mark.parametrize("channel", range(len(STEPS)), ids=map(str, STEPS))
def test_convolution_is_recurrence_over_long_rows(channel, length):
    convolved, recurred, wanted = (x[:, channel] for x in at_length(length))
    assert_close(convolved, recurred, tolerances.FLOAT32_S4_KERNEL)
    assert_close(convolved, wanted, tolerances.FLOAT32_S4_KERNEL)
    assert_close(recurred, wanted, tolerances.FLOAT32_S4_KERNEL)


@pytest.mark.parametrize("length", [1, 6, 13])
def test_truncated_c(length):
    model = legs((0.01, 0.2), states=6)
    actual = jax.jit(truncated, static_argnums=1)(model, length)
    for h in range(2):
        parts = (np.asarray(x[h], np.complex128) for x in (model.eigenvalues, model.p, model.b))
        a, _ = discrete(float(model.step[h]), *parts)
        c = np.asarray(model.c[0, h], np.complex128)
        wanted = np.r_[c, c.conj()] @ (np.eye(6) - np.linalg.matrix_power(a, length))
        np.testing.assert_allclose(actual[0, h], wanted[:3], **tolerances.EACH_FLOAT32_TERMS_OF_ONE)


def test_memory_of_the_kernel_with_its_gradients():
    """A Cauchy matrix at this size would have 537 MB, the powers of all channels 59."""
    model, length = jax.eval_shape(lambda: legs(np.geomspace(1e-3, 0.1, 256))), LONG

    def kernel(model):
        parts = model.step, model.eigenvalues, model.p, model.b
        return s4_kernel(*parts, truncated(model, length), length=length)

    def both(model, cotangent):
        k, pullback = jax.vjp(kernel, model)
        return k, pullback(cotangent)

    cotangent = jax.ShapeDtypeStruct((1, 256, length), jnp.float32)
    memory = jax.jit(both).lower(model, cotangent).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 64e6


def test_training_does_not_run_the_recurrence():
    """Nobody reads the final state, so no loop of a training step goes over the tokens."""
    mixer, length = build(S4Config(state_size=4), WIDTH), 300
    x = jnp.zeros((1, length, WIDTH))
    params = jax.jit(mixer.init)(jax.random.key(0), x)

    def loops(fn):
        text = jax.jit(fn).lower(params, x).compile().as_text()
        return text.count(f'"known_trip_count":{{"n":"{length}"}}')

    assert loops(mixer.apply) == 1
    assert loops(jax.grad(lambda params, x: jnp.sum(mixer.apply(params, x)[0] ** 2))) == 0


def test_marks():
    labels = S4Config().param_labels()
    ssm = {"log_A_real", "A_imag", "B", "P", "log_dt"}
    assert {name for name, label in labels.items() if label.group == "ssm"} == ssm
    assert {name for name, label in labels.items() if label.weight_decay} == {"C", "D"}
    assert all(label.float32 for label in labels.values())
    with pytest.raises(ValueError, match="S4Config: state_size=3 must be an even number"):
        S4Config(state_size=3)
