"""GAM against its equations; what a token sees of others."""

import jax
import numpy as np

from seqmodels.mixers import GAMConfig, build
from seqmodels.mixers.gam import GAM_22M
from tests.seqmodels.mixers import oracles

WIDTH, LENGTH = 6, 9


def test_equations():
    p, inputs, outputs = oracles.initialised(GAMConfig(slots=4), WIDTH, LENGTH)
    for x, y in zip(inputs, outputs, strict=True):
        near = oracles.causal_conv(x, p["conv/kernel"], p["conv/bias"])
        scores = np.exp(x @ p["memory"].T)
        recalled = scores / scores.sum(axis=1, keepdims=True) @ p["memory"]
        gates = oracles.sigmoid(x @ p["gate_proj/kernel"] + p["gate_proj/bias"])
        oracles.assert_close(y, gates[:, :WIDTH] * near + gates[:, WIDTH:] * recalled)


def test_a_token_sees_no_further_than_the_convolution():
    mixer, x = build(GAMConfig(slots=4, conv_size=3), WIDTH), np.ones((1, LENGTH, WIDTH), "f4")
    variables = jax.jit(mixer.init)(jax.random.key(0), x)
    other, run = x.copy(), jax.jit(mixer.apply)
    other[0, 4] += 1.0
    one, two = (np.asarray(run(variables, each)[0]) for each in (x, other))
    assert np.flatnonzero(np.any((one != two)[0], axis=1)).tolist() == [4, 5, 6]


def test_published_size():
    bank, gates, conv = 512 * 512, 513 * 1024, 4 * 512
    assert oracles.count(GAM_22M.config, GAM_22M.width) == bank + gates + conv
