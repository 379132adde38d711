"""The short convolution against its sum, token by token; its window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.layers.short_conv import ShortConv, start_window
from seqmodels.segments import Segments
from tests import tolerances

TAPS, WIDTH = 3, 4
IDS = np.array([[1] * 4 + [2] * 2 + [3] * 1 + [0] * 2], np.int32)


@pytest.mark.parametrize(("use_bias", "activation"), [(True, "silu"), (False, None)])
def test_sum_over_taps_and_carried_window(use_bias, activation):
    conv = ShortConv(TAPS, use_bias, activation)
    x = jax.random.normal(jax.random.key(0), (1, 9, WIDTH))
    variables = jax.jit(conv.init)(jax.random.key(1), x)
    p = {name: np.asarray(part, np.float64) for name, part in variables["params"].items()}
    assert {name: part.shape for name, part in p.items()} == {
        "kernel": (TAPS, WIDTH),
        **({"bias": (WIDTH,)} if use_bias else {}),
    }
    assert np.abs(p["kernel"]).max() <= TAPS**-0.5
    run = jax.jit(conv.apply)
    past = jax.random.normal(jax.random.key(2), (1, TAPS - 1, WIDTH))
    y, window = run(variables, x, past, segments=Segments.from_ids(IDS))

    tokens = np.concatenate([past, x], axis=1)[0].astype(np.float64)
    names = [1] * (TAPS - 1) + list(IDS[0])
    for t in range(7):
        pre = np.array(p.get("bias", np.zeros(WIDTH)))
        for j in range(TAPS):
            if names[t + j] == names[t + TAPS - 1]:
                pre = pre + p["kernel"][j] * tokens[t + j]
        expected = pre / (1 + np.exp(-pre)) if activation else pre
        np.testing.assert_allclose(y[0, t], expected, **tolerances.EACH_FLOAT32_CONV)
    assert not np.any(np.asarray(y)[0, 7:])
    np.testing.assert_array_equal(window[0], np.stack([np.zeros(WIDTH), np.asarray(x)[0, 6]]))


def test_window_takes_the_inputs_dtype():
    conv = ShortConv(TAPS)
    x = jnp.ones((2, 1, WIDTH), jnp.bfloat16)
    variables = conv.init(jax.random.key(1), x)
    window = start_window(2, TAPS, WIDTH, jnp.float32)
    y, window = conv.apply(variables, x, window)
    assert (y.dtype, window.dtype, window.shape) == (jnp.bfloat16, jnp.bfloat16, (2, 2, WIDTH))
    assert variables["params"]["kernel"].dtype == jnp.float32
