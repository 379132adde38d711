"""GLA against its equations; its size."""

import numpy as np
import pytest

from seqmodels.mixers import GLAConfig
from seqmodels.mixers.gla import GLA_1_3B
from tests.seqmodels.mixers import matrix_oracle, oracles
from tests.seqmodels.mixers.matrix_oracle import heads, output_projection

WIDTH, LENGTH = 4, 9


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            GLAConfig(heads=2, gate_rank=3, gate_temperature=4.0, init_std=0.5),
            marks=pytest.mark.full,
        ),
        # Values of 258 run as two heads of 129.
        GLAConfig(heads=1, expand_v=64.5, init_std=0.5),
    ],
)
def test_equations(config):
    p, inputs, outputs = oracles.initialised(config, WIDTH, LENGTH)
    for x, y in zip(inputs, outputs, strict=True):
        q, k, v, gate = (heads(x @ p[f"{name}_proj/kernel"], config.heads) for name in "qkvg")
        logits = x @ p["gk_proj/down/kernel"] @ p["gk_proj/up/kernel"] + p["gk_proj/up/bias"]
        decay = heads(oracles.sigmoid(logits) ** (1 / config.gate_temperature), config.heads)
        o = matrix_oracle.attention(q, k, v, decay, q.shape[-1] ** -0.5)
        oracles.assert_close(y, output_projection(o, p, oracles.silu(gate)))


def test_initial_values():
    p = oracles.fresh(GLAConfig(), 64)
    np.testing.assert_allclose(np.std(p["v_proj/kernel"]), 0.02, rtol=0.05)
    assert not np.any(p["gk_proj/up/bias"])  # decays near 0.958
    assert "gk_proj/down/bias" not in p
    assert np.all(p["o_norm/scale"] == 1)


def test_published_size():
    matrices = 2048 * (1024 + 1024 + 2048 + 2048) + 2048 * 2048
    assert matrix_oracle.count(GLA_1_3B) == matrices + 2048 * 16 + 16 * 1024 + 1024 + 512


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="heads=0 must be positive"):
        GLAConfig(heads=0)
    with pytest.raises(ValueError, match=r"gla mixer: keys of 2 channels .* into heads=3"):
        oracles.shapes(GLAConfig(heads=3), WIDTH)
