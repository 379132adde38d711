"""Qwen3-Next and Qwen3.5's dense text models in transformers' layout.

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
from seqmodels.layers.experts import ExpertsConfig
from seqmodels.mixers import AttentionConfig, GatedDeltaNetConfig
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import hybrid_language_model

_DELTA, _ATTENTION = "backbone/block_{}/gated_deltanet/", "backbone/block_{}/attention/"
_THEIR_DELTA, _THEIR_ATTENTION = "model.layers.{}.linear_attn.", "model.layers.{}.self_attn."
_EXPERT = "backbone/block_{}/experts/expert_{}/"
_THEIR_EXPERT = "model.layers.{}.mlp.experts.{}."
NAMES = (
    ("embedding/embedding", "model.embed_tokens.weight"),
    ("backbone/final_norm/zero_centered_rms/", "model.norm."),
    ("backbone/block_{}/norm/zero_centered_rms/", "model.layers.{}.input_layernorm."),
    ("backbone/block_{}/mlp_norm/zero_centered_rms/", "model.layers.{}.post_attention_layernorm."),
    ("backbone/block_{}/mlp_gate/", "model.layers.{}.mlp.gate_proj."),
    ("backbone/block_{}/mlp_in/", "model.layers.{}.mlp.up_proj."),
    ("backbone/block_{}/mlp_out/", "model.layers.{}.mlp.down_proj."),
    ("backbone/block_{}/experts/router/", "model.layers.{}.mlp.gate."),
    ("backbone/block_{}/experts/shared_gate/", "model.layers.{}.mlp.shared_expert.gate_proj."),
    ("backbone/block_{}/experts/shared_in/", "model.layers.{}.mlp.shared_expert.up_proj."),
    ("backbone/block_{}/experts/shared_out/", "model.layers.{}.mlp.shared_expert.down_proj."),
    ("backbone/block_{}/experts/shared_router/", "model.layers.{}.mlp.shared_expert_gate."),
    (_EXPERT + "w_gate", _THEIR_EXPERT + "gate_proj.weight"),
    (_EXPERT + "w_in", _THEIR_EXPERT + "up_proj.weight"),
    (_EXPERT + "w_out", _THEIR_EXPERT + "down_proj.weight"),
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


def _parts(prefix: str, names: str, leaf: str = "kernel") -> tuple[str, ...]:
    return tuple(f"{prefix}{name}/{leaf}" for name in names.split())


_CONVOLUTION = Join(_THEIR_DELTA + "conv1d.weight", _parts(_DELTA, "q_conv k_conv v_conv"))


def _joins(config: LanguageModelConfig) -> tuple[Join, ...]:
    joins = [
        Join(_THEIR_DELTA + "in_proj_qkv.weight", _parts(_DELTA, "q_proj k_proj v_proj")),
        _CONVOLUTION,
    ]
    return (*joins, *_gates(config))


def _joins_next(config: LanguageModelConfig) -> tuple[Join, ...]:
    """Qwen3-Next's: queries, keys, values and gates of a head of keys are together."""
    joins = [_CONVOLUTION]
    for mixer in config.backbone.mixers:
        if isinstance(mixer, GatedDeltaNetConfig):
            groups = mixer.key_heads or mixer.heads
            joins += [
                Join(_THEIR_DELTA + theirs, _parts(_DELTA, ours), groups)
                for theirs, ours in (
                    ("in_proj_qkvz.weight", "q_proj k_proj v_proj g_proj"),
                    ("in_proj_ba.weight", "b_proj a_proj"),
                )
            ]
    return (*joins, *_gates(config))


def _gates(config: LanguageModelConfig) -> list[Join]:
    """Attention's: each head's queries, then its gate."""
    return [
        Join(_THEIR_ATTENTION + theirs, _parts(_ATTENTION, "q_proj g_proj", ours), mixer.heads)
        for mixer in config.backbone.mixers
        if isinstance(mixer, AttentionConfig)
        for theirs, ours in (("q_proj.weight", "kernel"), ("q_proj.bias", "bias"))
    ]


def _read(fields: Fields) -> LanguageModelConfig:
    """Qwen3.5's."""
    return _hybrid(
        fields,
        {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 248_320, "kv_heads": 4},
        {"mlp": fields.take("intermediate_size", int, 12_288)},
    )


def _read_next(fields: Fields) -> LanguageModelConfig:
    """Qwen3-Next's."""
    layers = fields.take("num_hidden_layers", int, 48)
    # Of the loss.
    fields.ignore("router_aux_loss_coef", "output_router_logits")
    count = fields.take("num_experts", int, 512)
    step = fields.take("decoder_sparse_step", int, 1)
    named = fields.take("mlp_only_layers", list, None) or []
    dense = tuple(
        layer for layer in range(layers) if not count or layer in named or (layer + 1) % step
    )
    hidden = fields.take("intermediate_size", int, 5632)
    experts = ExpertsConfig(
        experts=max(count, 1),
        chosen=fields.take("num_experts_per_tok", int, 10) if count else 1,
        hidden=fields.take("moe_intermediate_size", int, 512),
        shared=fields.take("shared_expert_intermediate_size", int, 512),
        shared_gate=True,
        normalised=fields.take("norm_topk_prob", bool, True),
    )
    sparse = len(dense) < layers
    return _hybrid(
        fields,
        {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151_936, "kv_heads": 2},
        {
            "mlp": hidden if dense else None,
            "experts": experts if sparse else None,
            "dense_blocks": dense if sparse else (),
        },
    )


def _hybrid(
    fields: Fields, defaults: dict[str, int], second: dict[str, Any]
) -> LanguageModelConfig:
    """What both have; ``second`` says what follows the mixers."""
    width = fields.take("hidden_size", int, defaults["hidden_size"])
    epsilon = fields.take("rms_norm_eps", float, 1e-6)
    fields.require("hidden_act", "silu", same=("swish",))
    fields.require("attn_output_gate", True)
    # Heads that predict several tokens, which transformers leaves out, and in what dtype it runs.
    fields.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    interval = fields.take("full_attention_interval", int, 4)
    layers = fields.take("num_hidden_layers", int, defaults["num_hidden_layers"])
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
        **read_heads(fields, width, 16, defaults["kv_heads"], 256),
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
        second.pop("mlp"),
        fields.take("vocab_size", int, defaults["vocab_size"]),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        norm="zero_centered_rms",
        norm_epsilon=epsilon,
        **second,
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
        **({} if stack.mlp is None else {"intermediate_size": stack.mlp}),
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
        **written_rotary(attention, partial=True),
    }


def _write_next(config: LanguageModelConfig) -> dict[str, Any]:
    stack, experts = config.backbone, config.backbone.experts
    if experts is None:
        return _write(config) | {"num_experts": 0}
    return _write(config) | {
        "num_experts": experts.experts,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.hidden,
        "shared_expert_intermediate_size": experts.shared,
        "norm_topk_prob": experts.normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(stack.dense_blocks),
    }


_IMPLIED = frozenset({
    "backbone.norm_epsilon", "mixer.key_heads", "mixer.kv_heads", "mixer.head_size",
})  # fmt: skip
WITH_IMAGES = "qwen3_5"
"""The ``model_type`` of a checkpoint that has a model of images around the text model."""


def _text_only(name: str) -> str | None:
    if name.startswith(("model.visual.", "mtp.")):
        return None
    return name.replace("model.language_model.", "model.", 1)


QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    frozenset(_KINDS.values()),
    _read,
    _write,
    NAMES,
    _IMPLIED,
    _joins,
    text_only=_text_only,
)
QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    frozenset(_KINDS.values()),
    _read_next,
    _write_next,
    NAMES,
    _IMPLIED,
    _joins_next,
    experts_apart=True,
)
