"""DeltaNet against its equations; its size."""

import pytest

from seqmodels.mixers import DeltaNetConfig
from seqmodels.mixers.deltanet import DELTANET_1_3B
from tests.seqmodels.mixers import matrix_oracle, oracles
from tests.seqmodels.mixers.matrix_oracle import convolved, heads, output_projection, unit

WIDTH, LENGTH = 4, 9


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_equations(negative_eigenvalues):
    config = DeltaNetConfig(
        heads=2, expand_v=2.0, negative_eigenvalues=negative_eigenvalues, init_std=0.5
    )
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    for x, y in zip(inputs, outputs, strict=True):
        q, k, v = (heads(convolved(x, p, name), 2) for name in "qkv")
        beta = (1 + negative_eigenvalues) * oracles.sigmoid(x @ p["b_proj/kernel"])
        o = matrix_oracle.delta_rule(unit(q), unit(k), v, beta, 1.0)
        oracles.assert_close(y, output_projection(o, p))


def test_published_size():
    convolutions = 3 * 4 * 2048
    assert matrix_oracle.count(DELTANET_1_3B) == 4 * 2048**2 + 16 * 2048 + convolutions + 128
