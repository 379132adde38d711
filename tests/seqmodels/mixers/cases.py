"""Small configurations of every registered mixer, and the flags they must declare."""

from typing import Any

from seqmodels.mixers import (
    GLAConfig,
    HGRN2Config,
    LightningConfig,
    LRUConfig,
    RetNetConfig,
    S4DConfig,
    S5Config,
)

# Kernels have tests of their own; token by token they compile faster. Initial values as of a width
# of 2048 would be tiny here.
_MATRIX: dict[str, Any] = {"implementation": "reference", "init_std": 0.5}

CASES = {
    "s5": S5Config(state_size=8, blocks=2),
    "s5-bilinear": S5Config(state_size=8, discretization="bilinear", c_init="complex_normal"),
    "s5-bidirectional": S5Config(state_size=8, blocks=2, bidirectional=True),
    "s4d": S4DConfig(state_size=6),
    "s4d-tied-legs": S4DConfig(state_size=6, init="legs", n_ssm=2, discretization="bilinear"),
    "s4d-bidirectional": S4DConfig(state_size=6, bidirectional=True),
    "lru": LRUConfig(state_size=3),
    "lru-bidirectional": LRUConfig(state_size=3, bidirectional=True),
    "gla": GLAConfig(heads=2, expand_k=1.0, gate_rank=3, **_MATRIX),
    "retnet": RetNetConfig(heads=2, **_MATRIX),
    "lightning": LightningConfig(heads=2, head_size=3, layer=1, layers=3, **_MATRIX),
    "hgrn2": HGRN2Config(head_size=2, layer=1, layers=3, **_MATRIX),
}

# mode: (causal, streams, packs)
FLAGS = {
    "s5": (True, True, True),
    "s5-bilinear": (True, True, True),
    "s5-bidirectional": (False, False, True),
    "s4d": (True, True, True),
    "s4d-tied-legs": (True, True, True),
    "s4d-bidirectional": (False, False, True),
    "lru": (True, True, True),
    "lru-bidirectional": (False, False, True),
    "gla": (True, True, True),
    "retnet": (True, True, True),
    "lightning": (True, True, True),
    "hgrn2": (True, True, True),
}
