"""RecurrentGemma in transformers' layout."""

from typing import Any

from seqmodels.interop.attention import read_rotary
from seqmodels.interop.families import HEAD, Family
from seqmodels.interop.fields import Fields
from seqmodels.mixers import MixerConfig, RGLRUConfig, SlidingWindowConfig
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import griffin_language_model

NAMES = (
    ("embedding/embedding", "model.embed_tokens.weight"),
    ("backbone/final_norm/zero_centered_rms/", "model.final_norm."),
    ("backbone/block_{}/norm/zero_centered_rms/", "model.layers.{}.temporal_pre_norm."),
    ("backbone/block_{}/mixer/", "model.layers.{}.temporal_block."),
    ("backbone/block_{}/mlp_norm/zero_centered_rms/", "model.layers.{}.channel_pre_norm."),
    ("backbone/block_{}/mlp_gate/", "model.layers.{}.mlp_block.gate_proj."),
    ("backbone/block_{}/mlp_in/", "model.layers.{}.mlp_block.up_proj."),
    ("backbone/block_{}/mlp_out/", "model.layers.{}.mlp_block.down_proj."),
    ("head/kernel", HEAD),
)
_TANH_GELU = ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh")
_BLOCKS = {"recurrent": "rg_lru", "attention": "sliding_window"}


def _read(fields: Fields) -> LanguageModelConfig:
    width, layers = (
        fields.take(name, int, default)
        for name, default in (("hidden_size", 2560), ("num_hidden_layers", 26))
    )
    heads = fields.take("num_attention_heads", int, 10)
    fields.require("hidden_activation", "gelu_pytorch_tanh", same=_TANH_GELU)
    # transformers scales embeddings always, and repeats `block_types` itself.
    fields.ignore("embeddings_scale_by_sqrt_dim", "_block_types")
    # Initial values and training.
    fields.ignore("w_init_variance_scale", "final_w_init_variance_scale", "attention_dropout")
    hidden, rest = divmod(fields.take("intermediate_size", int, 7680), 2)
    if rest:
        raise ValueError(f"{fields.source}: intermediate_size={2 * hidden + rest} must be even")
    layout = _layout(fields, layers)
    size = fields.take("head_dim", int, None)
    base, fraction = read_rotary(fields, fraction=0.5)
    mixers: tuple[MixerConfig, ...] = (
        RGLRUConfig(
            lru_width=fields.take("lru_width", int, None),
            heads=heads,
            conv_size=fields.take("conv1d_width", int, 4),
            layers=layers,
        ),
        SlidingWindowConfig(
            heads=heads,
            kv_heads=fields.take("num_key_value_heads", int, None),
            head_size=None if size is None or size * heads == width else size,
            rotary_base=base,
            rotary_fraction=fraction,
            window=fields.take("attention_window_size", int, 2048),
            use_bias=fields.take("attention_bias", bool, False),
            use_out_bias=True,
        ),
    )
    return griffin_language_model(
        layout,
        tuple(config for config in mixers if config.mixer in layout),
        width,
        hidden,
        fields.take("vocab_size", int, 256_000),
        tie_embeddings=fields.take("tie_word_embeddings", bool, True),
        norm_epsilon=fields.take("rms_norm_eps", float, 1e-6),
        logit_cap=fields.take("logits_soft_cap", float, 30.0),
    )


def _layout(fields: Fields, layers: int) -> tuple[str, ...]:
    period = fields.take("block_types", list, ["recurrent", "recurrent", "attention"])
    unknown = [block for block in period if not isinstance(block, str) or block not in _BLOCKS]
    if unknown or not period:
        raise ValueError(
            f"{fields.source}: block_types={period!r} may hold only {', '.join(_BLOCKS)}"
        )
    return tuple(_BLOCKS[period[layer % len(period)]] for layer in range(layers))


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    stack = config.backbone
    mixers = {mixer.mixer: mixer for mixer in stack.mixers}
    recurrent, attention = mixers.get("rg_lru"), mixers.get("sliding_window")
    recurrent = recurrent or RGLRUConfig(heads=getattr(attention, "heads", 1))
    attention = attention or SlidingWindowConfig(heads=getattr(recurrent, "heads", 1))
    assert isinstance(recurrent, RGLRUConfig)
    assert isinstance(attention, SlidingWindowConfig)
    blocks = {ours: theirs for theirs, ours in _BLOCKS.items()}
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": stack.width,
        "intermediate_size": 2 * (stack.mlp or 0),
        "num_hidden_layers": len(stack.layout),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.groups,
        "head_dim": attention.head_size or stack.width // attention.heads,
        "attention_window_size": attention.window,
        "attention_bias": attention.use_bias,
        "block_types": [blocks[name] for name in stack.layout[: stack.period]],
        "conv1d_width": recurrent.conv_size,
        "lru_width": recurrent.lru_width or stack.width,
        "rms_norm_eps": stack.norm_epsilon or 1e-6,
        "logits_soft_cap": config.logit_cap,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": attention.rotary_base,
        "partial_rotary_factor": attention.rotary_fraction,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rotary_base,
            "partial_rotary_factor": attention.rotary_fraction,
        },
    }


RECURRENT_GEMMA = Family(
    "recurrent_gemma",
    "RecurrentGemmaForCausalLM",
    frozenset(_BLOCKS.values()),
    _read,
    _write,
    NAMES,
    frozenset({
        "backbone.norm_epsilon", "mixer.lru_width", "mixer.kv_heads", "mixer.head_size",
    }),
)  # fmt: skip
