"""Qwen3.5's dense text models in transformers' layout.

Three layers of Gated DeltaNet to one of gated attention; Qwen team, "Qwen3-Next", 2025.
"""

from typing import Any

from seqmodels.interop.attention import (
    FULL,
    RECURRENT,
    read_heads,
    read_layers,
    read_rotary,
    written_heads,
    written_rotary,
)
from seqmodels.interop.families import HEAD, Family
from seqmodels.interop.fields import Fields
from seqmodels.interop.layout import Join
from seqmodels.mixers import AttentionConfig, GatedDeltaNetConfig
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import hybrid_language_model

_DELTA, _ATTENTION = "backbone/block_{}/gated_deltanet/", "backbone/block_{}/attention/"
_THEIR_DELTA, _THEIR_ATTENTION = "model.layers.{}.linear_attn.", "model.layers.{}.self_attn."
NAMES = (
    ("embedding/embedding", "model.embed_tokens.weight"),
    ("backbone/final_norm/zero_centered_rms/", "model.norm."),
    ("backbone/block_{}/norm/zero_centered_rms/", "model.layers.{}.input_layernorm."),
    ("backbone/block_{}/mlp_norm/zero_centered_rms/", "model.layers.{}.post_attention_layernorm."),
    ("backbone/block_{}/mlp_gate/", "model.layers.{}.mlp.gate_proj."),
    ("backbone/block_{}/mlp_in/", "model.layers.{}.mlp.up_proj."),
    ("backbone/block_{}/mlp_out/", "model.layers.{}.mlp.down_proj."),
    (_DELTA + "g_proj/", _THEIR_DELTA + "in_proj_z."),
    (_DELTA + "b_proj/", _THEIR_DELTA + "in_proj_b."),
    (_DELTA + "a_proj/", _THEIR_DELTA + "in_proj_a."),
    (_DELTA + "o_norm/", _THEIR_DELTA + "norm."),
    (_DELTA + "o_proj/", _THEIR_DELTA + "out_proj."),
    (_DELTA, _THEIR_DELTA),
    (_ATTENTION, _THEIR_ATTENTION),
    ("head/kernel", HEAD),
)
_KINDS = {RECURRENT: "gated_deltanet", FULL: "attention"}


def _joins(config: LanguageModelConfig) -> tuple[Join, ...]:
    def parts(prefix: str, names: str, leaf: str) -> tuple[str, ...]:
        return tuple(f"{prefix}{name}/{leaf}" for name in names.split())

    joins = [
        Join(_THEIR_DELTA + "in_proj_qkv.weight", parts(_DELTA, "q_proj k_proj v_proj", "kernel")),
        Join(_THEIR_DELTA + "conv1d.weight", parts(_DELTA, "q_conv k_conv v_conv", "kernel")),
    ]
    heads = {mixer.heads for mixer in config.backbone.mixers if isinstance(mixer, AttentionConfig)}
    for number in heads:
        # Each head's queries, then its gate.
        joins += [
            Join(_THEIR_ATTENTION + theirs, parts(_ATTENTION, "q_proj g_proj", ours), number)
            for theirs, ours in (("q_proj.weight", "kernel"), ("q_proj.bias", "bias"))
        ]
    return tuple(joins)


def _read(fields: Fields) -> LanguageModelConfig:
    width = fields.take("hidden_size", int, 4096)
    epsilon = fields.take("rms_norm_eps", float, 1e-6)
    fields.require("hidden_act", "silu", same=("swish",))
    fields.require("attn_output_gate", True)
    # Heads that predict several tokens, which transformers leaves out, and in what dtype it runs.
    fields.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    interval = fields.take("full_attention_interval", int, 4)
    layers = fields.take("num_hidden_layers", int, 32)
    default = [RECURRENT if (layer + 1) % interval else FULL for layer in range(layers)]
    base, fraction = read_rotary(fields, fraction=0.25)
    key = fields.take("linear_key_head_dim", int, 128)
    delta = GatedDeltaNetConfig(
        heads=fields.take("linear_num_value_heads", int, 32),
        key_heads=fields.take("linear_num_key_heads", int, 16),
        head_size=key,
        expand_v=fields.take("linear_value_head_dim", int, 128) / key,
        conv_size=fields.take("linear_conv_kernel_dim", int, 4),
        norm_epsilon=epsilon,
    )
    attention = AttentionConfig(
        **read_heads(fields, width, 16, 4, 256),
        rotary_base=base,
        rotary_fraction=fraction,
        qk_norm=True,
        zero_centered_norm=True,
        output_gate=True,
        norm_epsilon=epsilon,
        use_bias=fields.take("attention_bias", bool, False),
    )
    return hybrid_language_model(
        read_layers(fields, _KINDS, default),
        (delta, attention),
        width,
        fields.take("intermediate_size", int, 12_288),
        fields.take("vocab_size", int, 248_320),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        norm="zero_centered_rms",
        norm_epsilon=epsilon,
    )


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    stack = config.backbone
    mixers: dict[str, Any] = {mixer.mixer: mixer for mixer in stack.mixers}
    delta = mixers.get("gated_deltanet", GatedDeltaNetConfig())
    attention = mixers.get("attention", AttentionConfig(heads=1))
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": stack.width,
        "intermediate_size": stack.mlp,
        "num_hidden_layers": len(stack.layout),
        "layer_types": [kinds[name] for name in stack.layout],
        **written_heads(attention),
        "head_dim": attention.head_size or stack.width // attention.heads,
        "attention_bias": attention.use_bias,
        "linear_num_value_heads": delta.heads,
        "linear_num_key_heads": delta.key_heads or delta.heads,
        "linear_key_head_dim": delta.head_size,
        "linear_value_head_dim": round(delta.expand_v * delta.head_size),
        "linear_conv_kernel_dim": delta.conv_size,
        "rms_norm_eps": stack.norm_epsilon or 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        **written_rotary(attention),
    }


QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    frozenset(_KINDS.values()),
    _read,
    _write,
    NAMES,
    frozenset({"backbone.norm_epsilon", "mixer.key_heads", "mixer.kv_heads", "mixer.head_size"}),
    _joins,
)
