"""Small configurations of every registered mixer, and the flags they must declare."""

from seqmodels.mixers import S4DConfig, S5Config

CASES = {
    "s5": S5Config(state_size=8, blocks=2),
    "s5-bilinear": S5Config(state_size=8, discretization="bilinear", c_init="complex_normal"),
    "s5-bidirectional": S5Config(state_size=8, blocks=2, bidirectional=True),
    "s4d": S4DConfig(state_size=6),
    "s4d-tied-legs": S4DConfig(state_size=6, init="legs", n_ssm=2, discretization="bilinear"),
    "s4d-bidirectional": S4DConfig(state_size=6, bidirectional=True),
}

# mode: (causal, streams, packs)
FLAGS = {
    "s5": (True, True, True),
    "s5-bilinear": (True, True, True),
    "s5-bidirectional": (False, False, True),
    "s4d": (True, True, True),
    "s4d-tied-legs": (True, True, True),
    "s4d-bidirectional": (False, False, True),
}
