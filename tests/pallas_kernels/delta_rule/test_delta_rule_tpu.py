"""The TPU kernels: interpreted on the host, their inverse in numpy, and compiled ahead of time."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, compat, segments, testing
from pallas_kernels.delta_rule import tpu, tpu_head, tpu_inverse
from pallas_kernels.delta_rule.config import Config
from pallas_kernels.delta_rule.shapes import SHAPES, case
from tests.pallas_kernels.delta_rule.cases import Case, assert_isolated, normalised

CHUNK = 16
CHIPS = {
    "v5e": compat.tpu.ChipVersion.TPU_V5E,
    "v5p": compat.tpu.ChipVersion.TPU_V5P,
    "v6e": compat.tpu.ChipVersion.TPU_V6E,
    "tpu7x": compat.tpu.ChipVersion.TPU_7X,
}


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def small(monkeypatch):
    """Three chunks, of two blocks each, and two blocks of heads, where there are 37 tokens and two
    or more heads."""
    monkeypatch.setattr(tpu, "_CHUNK", CHUNK)
    monkeypatch.setattr(tpu_inverse, "BLOCK", CHUNK // 2)
    monkeypatch.setattr(tpu, "_HEADS", 1)
    monkeypatch.setattr(tpu, "_HEADS_BY_KEY", 1)


def interpreted(case, **options):
    with testing.interpret():
        return jax.tree.map(np.asarray, case.run("tpu", **options))


# Each feature with each other at least once, not the full product: interpretation is slow.
FEATURES = {
    "groups-in-parts": {"decay": "head", "packed": True, "heads": 4, "batch": 1},
    "alone": {"decay": "head", "heads": 2, "batch": 2},
    "plain-packed": {"decay": None, "packed": True, "groups": 1, "heads": 2, "batch": 2},
    "key-packed": {"decay": "key", "packed": True, "heads": 2, "batch": 2},
    "key-grouped": {"decay": "key", "groups": 1, "heads": 2, "batch": 1, "length": 48},
}


@pytest.mark.parametrize("name", FEATURES)
def test_kernels_equal_the_oracle(name, small):
    case = Case(**({"length": 37} | FEATURES[name]))
    testing.assert_close(interpreted(case), case.oracle(), testing.FLOAT32_TOLERANCE)
