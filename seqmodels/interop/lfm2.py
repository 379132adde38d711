"""LFM2's dense models in transformers' layout: gated convolutions and a few layers of attention."""

from typing import Any

from seqmodels.interop.attention import (
    FULL,
    read_heads,
    read_layers,
    read_rotary,
    written_heads,
    written_rotary,
)
from seqmodels.interop.families import HEAD, Family
from seqmodels.interop.fields import Fields
from seqmodels.mixers import AttentionConfig, GatedConvConfig
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import hybrid_language_model

_ATTENTION, _THEIR_ATTENTION = "backbone/block_{}/attention/", "model.layers.{}.self_attn."
NAMES = (
    ("embedding/embedding", "model.embed_tokens.weight"),
    ("backbone/final_norm/rms/", "model.embedding_norm."),
    ("backbone/block_{}/norm/rms/", "model.layers.{}.operator_norm."),
    ("backbone/block_{}/mlp_norm/rms/", "model.layers.{}.ffn_norm."),
    ("backbone/block_{}/mlp_gate/", "model.layers.{}.feed_forward.w1."),
    ("backbone/block_{}/mlp_in/", "model.layers.{}.feed_forward.w3."),
    ("backbone/block_{}/mlp_out/", "model.layers.{}.feed_forward.w2."),
    ("backbone/block_{}/gated_conv/", "model.layers.{}.conv."),
    (_ATTENTION + "q_norm/", _THEIR_ATTENTION + "q_layernorm."),
    (_ATTENTION + "k_norm/", _THEIR_ATTENTION + "k_layernorm."),
    (_ATTENTION + "o_proj/", _THEIR_ATTENTION + "out_proj."),
    (_ATTENTION, _THEIR_ATTENTION),
    ("head/kernel", HEAD),
)
_KINDS = {"conv": "gated_conv", FULL: "attention"}


def _read(fields: Fields) -> LanguageModelConfig:
    width = fields.take("hidden_size", int, 2560)
    epsilon = fields.take("norm_eps", float, 1e-5)
    # Repeated by the files of the first models; transformers reads none of them.
    fields.ignore("block_dim", "block_norm_eps", "conv_dim", "conv_dim_out", "num_heads")
    fields.ignore("block_use_swiglu", "use_pos_enc")
    # Initial values.
    fields.ignore("block_mlp_init_scale", "block_out_init_scale")
    fields.ignore("block_use_xavier_init", "conv_use_xavier_init")
    layers = fields.take("num_hidden_layers", int, 32)
    attended = fields.take("full_attn_idxs", list, None)
    default = [FULL if attended is None or layer in attended else "conv" for layer in range(layers)]
    base, fraction = read_rotary(fields, base=1e6)
    attention = AttentionConfig(
        **read_heads(fields, width, 32, 8),
        rotary_base=base,
        rotary_fraction=fraction,
        qk_norm=True,
        norm_epsilon=epsilon,
    )
    conv = GatedConvConfig(
        conv_size=fields.take("conv_L_cache", int, 3),
        use_bias=fields.take("conv_bias", bool, False),
    )
    tied = fields.take("tie_word_embeddings", bool, True)
    return hybrid_language_model(
        read_layers(fields, _KINDS, default),
        (conv, attention),
        width,
        _hidden_layer(fields),
        fields.take("vocab_size", int, 65_536),
        tie_embeddings=fields.take("tie_embedding", bool, tied),
        norm_epsilon=epsilon,
    )


def _hidden_layer(fields: Fields) -> int:
    """Width of the MLP's: mostly two thirds of what the file says, rounded up."""
    size = fields.take("intermediate_size", int, 12_288)
    size = fields.take("block_ff_dim", int, size)
    multiplier = fields.take("block_ffn_dim_multiplier", float, 1.0)
    multiple = fields.take("block_multiple_of", int, 256)
    if not fields.take("block_auto_adjust_ff_dim", bool, True):
        return size
    size = int(2 * size / 3)
    if multiplier is None:
        return size
    return multiple * -(-int(multiplier * size) // multiple)


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    stack = config.backbone
    mixers: dict[str, Any] = {mixer.mixer: mixer for mixer in stack.mixers}
    conv = mixers.get("gated_conv", GatedConvConfig())
    attention = mixers.get("attention", AttentionConfig(heads=1, rotary_base=1e6))
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    written = {
        "vocab_size": config.vocabulary_size,
        "hidden_size": stack.width,
        "intermediate_size": stack.mlp,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": len(stack.layout),
        "layer_types": [kinds[name] for name in stack.layout],
        **written_heads(attention),
        "conv_L_cache": conv.conv_size,
        "conv_bias": conv.use_bias,
        "norm_eps": stack.norm_epsilon or 1e-6,
        "tie_word_embeddings": config.tie_embeddings,
        **written_rotary(attention),
    }
    size = attention.head_size
    return written if size is None else written | {"head_dim": size}


LFM2 = Family(
    "lfm2",
    "Lfm2ForCausalLM",
    frozenset(_KINDS.values()),
    _read,
    _write,
    NAMES,
    frozenset({"backbone.norm_epsilon", "mixer.kv_heads", "mixer.head_size"}),
)
