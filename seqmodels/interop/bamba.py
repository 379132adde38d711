"""Bamba and the Granite 4 hybrids in transformers' layout: Mamba-2 and some attention."""

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
from seqmodels.interop.mamba import step_limits
from seqmodels.layers.experts import ExpertsConfig
from seqmodels.mixers import AttentionConfig, Mamba2Config
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import hybrid_language_model

_SHARED_NAMES = (
    ("embedding/embedding", "model.embed_tokens.weight"),
    ("backbone/block_{}/norm/rms/", "model.layers.{}.input_layernorm."),
    ("backbone/block_{}/mamba2/", "model.layers.{}.mamba."),
    ("backbone/block_{}/attention/", "model.layers.{}.self_attn."),
    ("head/kernel", HEAD),
)
BAMBA_NAMES = (
    *_SHARED_NAMES,
    ("backbone/final_norm/rms/", "model.final_layernorm."),
    ("backbone/block_{}/mlp_norm/rms/", "model.layers.{}.pre_ff_layernorm."),
    ("backbone/block_{}/mlp_gate/", "model.layers.{}.feed_forward.gate_proj."),
    ("backbone/block_{}/mlp_in/", "model.layers.{}.feed_forward.up_proj."),
    ("backbone/block_{}/mlp_out/", "model.layers.{}.feed_forward.down_proj."),
)
_EXPERTS = "backbone/block_{}/experts/"
GRANITE_NAMES = (
    *_SHARED_NAMES,
    ("backbone/final_norm/rms/", "model.norm."),
    ("backbone/block_{}/mlp_norm/rms/", "model.layers.{}.post_attention_layernorm."),
    ("backbone/block_{}/mlp_out/", "model.layers.{}.shared_mlp.output_linear."),
    (_EXPERTS + "shared_out/", "model.layers.{}.shared_mlp.output_linear."),
    (_EXPERTS + "router/", "model.layers.{}.block_sparse_moe.router.layer."),
    (_EXPERTS + "w_out", "model.layers.{}.block_sparse_moe.output_linear.weight"),
)


def _granite_joins(config: LanguageModelConfig) -> tuple[Join, ...]:
    shared, experts = "model.layers.{}.shared_mlp.input_linear.weight", config.backbone.experts
    if experts is None:
        block = "backbone/block_{}/"
        return (Join(shared, (block + "mlp_gate/kernel", block + "mlp_in/kernel")),)
    return (
        Join(shared, (_EXPERTS + "shared_gate/kernel", _EXPERTS + "shared_in/kernel")),
        Join(
            "model.layers.{}.block_sparse_moe.input_linear.weight",
            (_EXPERTS + "w_gate", _EXPERTS + "w_in"),
            experts.experts,
            stacked=True,
        ),
    )


_KINDS = {RECURRENT: "mamba2", FULL: "attention"}
_OLDER_KINDS = {"mamba": "mamba2", "attention": "attention"}


def has_multipliers(config: LanguageModelConfig) -> bool:
    """Whether a model has what Granite's have and Bamba's do not."""
    attention = [mixer for mixer in config.backbone.mixers if isinstance(mixer, AttentionConfig)]
    if config.backbone.experts is not None:
        return True
    scales = (config.backbone.residual_scale, config.embedding_scale, config.logit_scale)
    return set(scales) != {1.0} or any(
        mixer.score_scale is not None or mixer.rotary_base is None for mixer in attention
    )


def _read_mamba2(fields: Fields, width: int, layers: int, epsilon: float) -> Mamba2Config:
    fields.require("hidden_act", "silu", same=("swish",))
    # How transformers computes the same.
    fields.ignore("mamba_chunk_size")
    heads, expand = fields.take("mamba_n_heads", int, 128), fields.take("mamba_expand", int, 2)
    size = fields.take_size("mamba_d_head")
    size = expand * width // max(heads, 1) if size is None else size
    if heads * size != expand * width:
        raise ValueError(
            f"{fields.source}: mamba_n_heads * mamba_d_head = {heads * size} must be mamba_expand "
            f"* hidden_size = {expand * width}"
        )
    return Mamba2Config(
        state_size=fields.take("mamba_d_state", int, 256),
        expand=expand,
        head_size=size,
        groups=fields.take("mamba_n_groups", int, 1),
        conv_size=fields.take("mamba_d_conv", int, 4),
        use_bias=fields.take("mamba_proj_bias", bool, False),
        use_conv_bias=fields.take("mamba_conv_bias", bool, True),
        time_step_limit=step_limits(fields, "time_step_limit"),
        norm_epsilon=epsilon,
        layers=layers,
    )


def _read_bamba(fields: Fields) -> LanguageModelConfig:
    width, layers = fields.take("hidden_size", int, 4096), fields.take("num_hidden_layers", int, 32)
    epsilon = fields.take("rms_norm_eps", float, 1e-5)
    # Which logits a call returns, the loss, and the rotated channels, of which transformers always
    # has half.
    fields.ignore("num_logits_to_keep", "z_loss_coefficient", "attn_rotary_emb")
    attended = fields.take("attn_layer_indices", list, None) or []
    base, fraction = read_rotary(fields, fraction=0.5)
    attention = AttentionConfig(
        **read_heads(fields, width, 32, 8),
        rotary_base=base,
        rotary_fraction=fraction,
        use_bias=fields.take("attention_bias", bool, False),
    )
    return hybrid_language_model(
        tuple("attention" if layer in attended else "mamba2" for layer in range(layers)),
        (_read_mamba2(fields, width, layers, epsilon), attention),
        width,
        fields.take("intermediate_size", int, 14_336),
        fields.take("vocab_size", int, 128_000),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        norm_epsilon=epsilon,
        mlp_bias=fields.take("mlp_bias", bool, False),
    )


def _read_granite(fields: Fields) -> LanguageModelConfig:
    width = fields.take("hidden_size", int, 4096)
    # Of the loss and of initial values.
    fields.ignore("router_aux_loss_coef", "output_router_logits", "init_method")
    hidden = fields.take("shared_intermediate_size", int, 1024)
    experts = _granite_experts(fields, hidden)
    fields.require("normalization_function", "rmsnorm")
    epsilon = fields.take("rms_norm_eps", float, 1e-6)
    base, fraction = read_rotary(fields)
    positions = fields.take("position_embedding_type", str, None)
    fields.require("position_embedding_type", None, same=("nope", "rope"))
    layers = fields.take("num_hidden_layers", int, 32)
    attention = AttentionConfig(
        **read_heads(fields, width, 32, None),
        rotary_base=base if positions == "rope" else None,
        rotary_fraction=fraction,
        score_scale=fields.take("attention_multiplier", float, 1.0),
        use_bias=fields.take("attention_bias", bool, False),
    )
    return hybrid_language_model(
        read_layers(fields, _KINDS | _OLDER_KINDS, [RECURRENT] * layers),
        (_read_mamba2(fields, width, layers, epsilon), attention),
        width,
        hidden if experts is None else None,
        fields.take("vocab_size", int, 32_000),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        norm_epsilon=epsilon,
        experts=experts,
        residual_scale=fields.take("residual_multiplier", float, 1.0),
        embedding_scale=fields.take("embedding_multiplier", float, 1.0),
        logit_scale=1 / fields.take("logits_scaling", float, 1.0),
    )


def _granite_experts(fields: Fields, shared: int) -> ExpertsConfig | None:
    count = fields.take("num_local_experts", int, 8)
    hidden = fields.take("intermediate_size", int, 11_008)
    chosen = fields.take("num_experts_per_tok", int, 2)
    if not count:
        return None
    return ExpertsConfig(experts=count, chosen=chosen, hidden=hidden, shared=shared)


def _written(config: LanguageModelConfig) -> dict[str, Any]:
    """The fields that both have."""
    stack = config.backbone
    mixers: dict[str, Any] = {mixer.mixer: mixer for mixer in stack.mixers}
    recurrent = mixers.get("mamba2", Mamba2Config(head_size=stack.width))
    attention = mixers.get("attention", AttentionConfig(heads=1, rotary_fraction=0.5))
    written = {
        "vocab_size": config.vocabulary_size,
        "hidden_size": stack.width,
        "num_hidden_layers": len(stack.layout),
        **written_heads(attention),
        "attention_bias": attention.use_bias,
        "mamba_n_heads": recurrent.heads(stack.width),
        "mamba_d_head": recurrent.head_size,
        "mamba_d_state": recurrent.state_size,
        "mamba_expand": recurrent.expand,
        "mamba_n_groups": recurrent.groups,
        "mamba_d_conv": recurrent.conv_size,
        "mamba_proj_bias": recurrent.use_bias,
        "mamba_conv_bias": recurrent.use_conv_bias,
        "time_step_limit": list(recurrent.time_step_limit),
        "rms_norm_eps": stack.norm_epsilon or 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
    }
    size = attention.head_size
    return written if size is None else written | {"head_dim": size}


def _write_bamba(config: LanguageModelConfig) -> dict[str, Any]:
    stack = config.backbone
    attention = next(
        (m for m in stack.mixers if isinstance(m, AttentionConfig)),
        AttentionConfig(rotary_fraction=0.5),
    )
    return _written(config) | {
        **written_rotary(attention, partial=True),
        "intermediate_size": stack.mlp,
        "mlp_bias": stack.mlp_bias,
        "attn_layer_indices": [i for i, name in enumerate(stack.layout) if name == "attention"],
    }


def _write_granite(config: LanguageModelConfig) -> dict[str, Any]:
    stack = config.backbone
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    attention = next(
        (m for m in stack.mixers if isinstance(m, AttentionConfig)),
        AttentionConfig(heads=1, rotary_base=None),
    )
    size, scale = attention.head_size or stack.width // attention.heads, attention.score_scale
    experts: dict[str, Any] = {"num_local_experts": 0, "shared_intermediate_size": stack.mlp}
    if stack.experts is not None:
        experts = {
            "num_local_experts": stack.experts.experts,
            "num_experts_per_tok": stack.experts.chosen,
            "intermediate_size": stack.experts.hidden,
            "shared_intermediate_size": stack.experts.shared,
        }
    return _written(config) | {
        "layer_types": [kinds[name] for name in stack.layout],
        **experts,
        **written_rotary(attention),
        "position_embedding_type": None if attention.rotary_base is None else "rope",
        "attention_multiplier": size**-0.5 if scale is None else scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": stack.residual_scale,
        "logits_scaling": 1 / config.logit_scale,
    }


_IMPLIED = frozenset({"backbone.norm_epsilon", "mixer.kv_heads", "mixer.head_size"})
BAMBA = Family(
    "bamba", "BambaForCausalLM", frozenset(_KINDS.values()), _read_bamba, _write_bamba,
    BAMBA_NAMES, _IMPLIED,
)  # fmt: skip
GRANITE = Family(
    "granitemoehybrid", "GraniteMoeHybridForCausalLM", frozenset(_KINDS.values()), _read_granite,
    _write_granite, GRANITE_NAMES, _IMPLIED | {"mixer.score_scale"}, _granite_joins,
)  # fmt: skip
