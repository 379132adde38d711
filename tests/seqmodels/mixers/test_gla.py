"""GLA against its equations; its size."""

import numpy as np
import pytest

from seqmodels.mixers import GLAConfig
from seqmodels.mixers.gla import GLA_1_3B
from tests.seqmodels.mixers import matrix_oracle as oracle


@pytest.mark.parametrize(
    "config",
    [
        GLAConfig(heads=2, gate_rank=3, gate_temperature=4.0),
        # Values of 258 run as two heads of 129.
        GLAConfig(heads=1, expand_v=64.5),
    ],
)
def test_equations(config):
    p, inputs, outputs = oracle.applied(config)
    for x, y in zip(inputs, outputs, strict=True):
        q, k, v, gate = (
            (x @ p[f"{name}_proj"]["kernel"]).reshape(len(x), config.heads, -1) for name in "qkvg"
        )
        low = p["gk_proj"]
        logits = x @ low["down"]["kernel"] @ low["up"]["kernel"] + low["up"]["bias"]
        decay = oracle.sigmoid(logits).reshape(k.shape) ** (1 / config.gate_temperature)
        o = oracle.attention(q, k, v, decay, q.shape[-1] ** -0.5)
        o = oracle.rms(o) * p["o_norm"]["scale"] * oracle.silu(gate)
        oracle.assert_close(y, o.reshape(len(x), -1) @ p["o_proj"]["kernel"])


def test_initial_values():
    p = oracle.initial_parameters(GLAConfig(), width=64)
    np.testing.assert_allclose(np.std(p["v_proj"]["kernel"]), 0.02, rtol=0.05)
    assert not np.any(p["gk_proj"]["up"]["bias"])  # decays near 0.958
    assert set(p["gk_proj"]["down"]) == {"kernel"}
    assert np.all(p["o_norm"]["scale"] == 1)


def test_published_size():
    matrices = 2048 * (1024 + 1024 + 2048 + 2048) + 2048 * 2048
    assert oracle.count(GLA_1_3B, 2048) == matrices + 2048 * 16 + 16 * 1024 + 1024 + 512


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="heads=0 must be positive"):
        GLAConfig(heads=0)
    with pytest.raises(ValueError, match=r"gla mixer: keys of 2 channels .* into heads=3"):
        oracle.initial_parameters(GLAConfig(heads=3))
