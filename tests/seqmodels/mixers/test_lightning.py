"""Lightning attention against its equations; its slopes, its size."""

import numpy as np
import pytest

from seqmodels.mixers import LightningConfig
from seqmodels.mixers.lightning import LIGHTNING_MINIMAX_TEXT_01, slopes
from tests.seqmodels.mixers import matrix_oracle, oracles
from tests.seqmodels.mixers.matrix_oracle import heads, output_projection

WIDTH, LENGTH = 4, 9


def test_equations():
    config = LightningConfig(heads=2, head_size=3, layer=1, layers=5, init_std=0.5)
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    decay = np.exp(-np.array([2.0**-4, 2.0**-8]) * (0.75 + 1e-5))
    for x, y in zip(inputs, outputs, strict=True):
        q, k, v = (heads(oracles.silu(x @ p[f"{name}_proj/kernel"]), 2) for name in "qkv")
        o = matrix_oracle.attention(q, k, v, decay[:, None], 1.0).reshape(LENGTH, -1)
        oracles.assert_close(y, output_projection(o, p, oracles.sigmoid(x @ p["g_proj/kernel"])))


def test_slopes():
    np.testing.assert_allclose(slopes(4, 0, 1), [0.25, 2**-4, 2**-6, 2**-8], rtol=2e-5)
    np.testing.assert_allclose(slopes(4, 2, 5), 0.5 * slopes(4, 0, 5), rtol=2e-5)
    np.testing.assert_allclose(slopes(4, 4, 5), 1e-5 * slopes(4, 0, 5), rtol=2e-5)


def test_published_size():
    assert matrix_oracle.count(LIGHTNING_MINIMAX_TEXT_01) == 5 * 6144 * 8192 + 8192


def test_bad_layers_are_refused():
    with pytest.raises(ValueError, match=r"layer=4 must be in \[0, layers=4\)"):
        LightningConfig(layer=4, layers=4)
