"""Small configurations of every registered mixer, and the flags they must declare."""

from typing import Any

from seqmodels.mixers import (
    AttentionConfig,
    BasedConfig,
    BidirectionalConfig,
    ConvConfig,
    DeltaNetConfig,
    GAMConfig,
    GatedConvConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    HGRN2Config,
    HydraConfig,
    HyenaConfig,
    JRTConfig,
    KDAConfig,
    LightningConfig,
    LRUConfig,
    Mamba2Config,
    Mamba3Config,
    MambaConfig,
    MoMConfig,
    MonarchConfig,
    OrchidConfig,
    ParallelConfig,
    RATConfig,
    RetNetConfig,
    RGLRUConfig,
    S4Config,
    S4DConfig,
    S5Config,
    SCOUTConfig,
    SGConvConfig,
    SlidingWindowConfig,
)

# Initial values as of a width of 2048 would be tiny here.
_MATRIX: dict[str, Any] = {"init_std": 0.5}

CASES = {
    "s5": S5Config(state_size=8, blocks=2),
    "s5-bilinear": S5Config(state_size=8, discretization="bilinear", c_init="complex_normal"),
    "s5-bidirectional": S5Config(state_size=8, blocks=2, bidirectional=True),
    "s4": S4Config(state_size=6),
    "s4-bidirectional": S4Config(state_size=4, n_ssm=2, bidirectional=True),
    "s4d": S4DConfig(state_size=6),
    "s4d-tied-legs": S4DConfig(state_size=6, init="legs", n_ssm=2, discretization="bilinear"),
    "s4d-bidirectional": S4DConfig(state_size=6, bidirectional=True),
    "s4d-weighted": S4DConfig(state_size=6, bidirectional=True, frequency_weight=True),
    "lru": LRUConfig(state_size=3),
    "lru-bidirectional": LRUConfig(state_size=3, bidirectional=True),
    "mamba": MambaConfig(state_size=3),
    "mamba-blocks": MambaConfig(state_size=2, blocks=2),
    "conv": ConvConfig(conv_size=3),
    "gated_conv": GatedConvConfig(use_bias=True),
    "rg_lru": RGLRUConfig(lru_width=6, heads=3),
    "mamba2": Mamba2Config(state_size=3, head_size=2, groups=2),
    "hydra": HydraConfig(state_size=3, head_size=2, groups=2),
    # Larger, so that no head has a row of outputs near zero before its norm, which would amplify
    # the rounding of it beyond what the contract allows (seen on one kind of CPU).
    "gla": GLAConfig(heads=2, expand_k=1.0, gate_rank=3, **(_MATRIX | {"init_std": 1.0})),
    "retnet": RetNetConfig(heads=2, init_std=1.0),
    "lightning": LightningConfig(heads=2, head_size=3, layer=1, layers=3, **_MATRIX),
    "hgrn2": HGRN2Config(head_size=2, layer=1, layers=3, **_MATRIX),
    "deltanet": DeltaNetConfig(heads=2, **_MATRIX),
    "gated_deltanet": GatedDeltaNetConfig(heads=4, key_heads=2, head_size=8, **_MATRIX),
    "kda": KDAConfig(heads=2, head_size=16, **_MATRIX),
    "attention": AttentionConfig(heads=2, init_std=0.5),
    "attention-grouped": AttentionConfig(
        heads=4, kv_heads=2, head_size=8, rotary_base=None, qk_norm=True, init_std=0.5
    ),
    "attention-gated": AttentionConfig(
        heads=2,
        head_size=8,
        qk_norm=True,
        zero_centered_norm=True,
        output_gate=True,
        score_scale=0.4,
        rotary_fraction=0.5,
        use_bias=True,
        init_std=0.5,
    ),
    "attention-bidirectional": AttentionConfig(heads=1, bidirectional=True, init_std=0.5),
    "sliding_window": SlidingWindowConfig(heads=2, kv_heads=1, window=3, init_std=0.5),
    "sliding_window-sinks": SlidingWindowConfig(
        heads=1, window=4, sinks=2, rotary_fraction=0.5, init_std=0.5
    ),
    "rat": RATConfig(chunk=3, heads=2, groups=1, init_std=0.5),
    "rat-chunks-of-one": RATConfig(chunk=1, heads=1, groups=1, rotary_base=None, init_std=0.5),
    "scout": SCOUTConfig(heads=2, interval=3, init_std=0.5),
    # Two softmaxes in a row: with sharper scores bfloat16 gradients are mostly rounding.
    "scout-window": SCOUTConfig(
        heads=2,
        kv_heads=1,
        interval=2,
        local=SlidingWindowConfig(heads=1, window=2, init_std=0.25),
        init_std=0.25,
    ),
    "scout-mamba": SCOUTConfig(
        heads=1,
        interval=3,
        local=MambaConfig(state_size=2),
        init_std=0.5,
    ),
}

# Sines of 14 times their argument, in three layers, amplify rounding a thousand times.
_FILTER: dict[str, Any] = {"filter_width": 8, "filter_frequency": 1.0}
# Filters shorter and longer than a third of a row.
CASES |= {
    "based": BasedConfig(heads=2, feature_size=3, **_MATRIX),
    "jrt": JRTConfig(heads=2, feature_size=3, prefix=90, **_MATRIX),
    "gam": GAMConfig(slots=5),
    "mamba3": Mamba3Config(state_size=6, head_size=4, groups=2),
    "mamba3-rank": Mamba3Config(state_size=4, head_size=8, rank=2),
    "mom": MoMConfig(heads=2, head_size=8, memories=3, **_MATRIX),
    "mom-gla": MoMConfig(heads=2, head_size=8, rule="gla", shared=False, **_MATRIX),
    "sgconv": SGConvConfig(length=100, scale_size=8),
    "sgconv-bidirectional": SGConvConfig(length=60, scale_size=8, bidirectional=True),
    "hyena": HyenaConfig(length=50, filter_embedding=5, order=3, **_FILTER),
    "monarch": MonarchConfig(length=100, bidirectional=False, width_blocks=4, **_FILTER),
    "monarch-bidirectional": MonarchConfig(length=250, **_FILTER),
    "orchid": OrchidConfig(),
}
CASES["parallel"] = ParallelConfig(
    (
        Mamba2Config(state_size=3, head_size=2, groups=2, norm="before_gate"),
        SlidingWindowConfig(heads=2, kv_heads=1, window=3, init_std=0.5),
    ),
    out_scales=(0.5, 2.0),
)
CASES["parallel-attention"] = ParallelConfig(
    (
        AttentionConfig(heads=2, init_std=0.5),
        Mamba2Config(
            state_size=3, head_size=2, num_heads=3, norm=None, part_scales=(0.5, 1.5, 1.0, 2.0, 0.7)
        ),
    ),
    in_scales=(0.5, 1.5),
)
CASES["bidirectional"] = BidirectionalConfig(CASES["lru"])
CASES["bidirectional-tied"] = BidirectionalConfig(CASES["s4"], tied=True)

# One of each kind, which the contract's tests always run.
KINDS = {"s5", "s4", "mamba", "gla", "hydra", "rat"}

# The prefix of a document is read in one call: pieces of rows are another function of the tokens.
READ_WHOLE = {"jrt"}

# States of these hold a cache that grows: they begin with initial_state(.., max_length=..).
GROWING = {
    "attention",
    "attention-grouped",
    "attention-gated",
    "rat",
    "rat-chunks-of-one",
    "scout",
    "scout-window",
    "scout-mamba",
    "parallel-attention",
}

# mode: (causal, stateful, supports_packing)
FLAGS = {
    "s5": (True, True, True),
    "s5-bilinear": (True, True, True),
    "s5-bidirectional": (False, False, True),
    "s4": (True, True, False),
    "s4-bidirectional": (False, False, False),
    "s4d": (True, True, True),
    "s4d-tied-legs": (True, True, True),
    "s4d-bidirectional": (False, False, True),
    "s4d-weighted": (False, False, False),
    "lru": (True, True, True),
    "lru-bidirectional": (False, False, True),
    "mamba": (True, True, True),
    "mamba-blocks": (True, True, True),
    "conv": (True, True, True),
    "gated_conv": (True, True, True),
    "rg_lru": (True, True, True),
    "mamba2": (True, True, True),
    "hydra": (False, False, False),
    "bidirectional": (False, False, True),
    "bidirectional-tied": (False, False, False),
    "gla": (True, True, True),
    "retnet": (True, True, True),
    "lightning": (True, True, True),
    "hgrn2": (True, True, True),
    "deltanet": (True, True, True),
    "gated_deltanet": (True, True, True),
    "kda": (True, True, True),
    "attention": (True, True, True),
    "attention-grouped": (True, True, True),
    "attention-gated": (True, True, True),
    "attention-bidirectional": (False, False, True),
    "sliding_window": (True, True, True),
    "sliding_window-sinks": (True, True, True),
    "rat": (True, True, True),
    "rat-chunks-of-one": (True, True, True),
    "scout": (True, True, True),
    "scout-window": (True, True, True),
    "scout-mamba": (True, True, True),
    "parallel": (True, True, True),
    "parallel-attention": (True, True, True),
    "based": (True, True, True),
    "jrt": (False, True, True),
    "gam": (True, True, True),
    "mamba3": (True, True, True),
    "mamba3-rank": (True, True, True),
    "mom": (True, True, True),
    "mom-gla": (True, True, True),
    "sgconv": (True, True, False),
    "sgconv-bidirectional": (False, False, False),
    "hyena": (True, True, False),
    "monarch": (True, True, False),
    "monarch-bidirectional": (False, False, False),
    "orchid": (False, False, False),
}
