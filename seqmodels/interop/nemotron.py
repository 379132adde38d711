"""Nemotron-H in transformers' layout: Mamba-2, some attention, MLPs and experts, each a block.

NVIDIA, "Nemotron-H: A Family of Accurate and Efficient Hybrid Mamba-Transformer Models", 2025
(arXiv:2504.03624).
"""

from typing import Any

from seqmodels.interop.attention import FULL, RECURRENT, read_heads, written_heads
from seqmodels.interop.families import HEAD, Family
from seqmodels.interop.fields import Fields
from seqmodels.layers.experts import ExpertsConfig
from seqmodels.mixers import AttentionConfig, Mamba2Config
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import single_branch_language_model

_BLOCK, _THEIR_MIXER = "backbone/block_{}/", "backbone.layers.{}.mixer."
_EXPERTS, _EXPERT = _BLOCK + "experts/", _BLOCK + "experts/expert_{}/"
_THEIR_EXPERT = _THEIR_MIXER + "experts.{}."
NAMES = (
    ("embedding/embedding", "backbone.embeddings.weight"),
    ("backbone/final_norm/rms/", "backbone.norm_f."),
    (_BLOCK + "norm/rms/", "backbone.layers.{}.norm."),
    (_BLOCK + "mlp_norm/rms/", "backbone.layers.{}.norm."),
    (_BLOCK + "mixer/", _THEIR_MIXER),
    (_BLOCK + "mlp_in/", _THEIR_MIXER + "up_proj."),
    (_BLOCK + "mlp_out/", _THEIR_MIXER + "down_proj."),
    (_EXPERTS + "router/", _THEIR_MIXER + "gate."),
    (_EXPERTS + "correction_bias", _THEIR_MIXER + "gate.e_score_correction_bias"),
    (_EXPERTS + "shared_in/", _THEIR_MIXER + "shared_experts.up_proj."),
    (_EXPERTS + "shared_out/", _THEIR_MIXER + "shared_experts.down_proj."),
    (_EXPERTS + "latent_in/", _THEIR_MIXER + "fc1_latent_proj."),
    (_EXPERTS + "latent_out/", _THEIR_MIXER + "fc2_latent_proj."),
    (_EXPERT + "w_in", _THEIR_EXPERT + "up_proj.weight"),
    (_EXPERT + "w_out", _THEIR_EXPERT + "down_proj.weight"),
    ("head/kernel", HEAD),
)
_KINDS = {RECURRENT: "mamba2", FULL: "attention", "mlp": "mlp", "moe": "experts"}
_OLDER_KINDS = {
    "mamba": "mamba2", "M": "mamba2", "attention": "attention", "*": "attention", "-": "mlp",
    "E": "experts",
}  # fmt: skip
_OF_EXPERTS = (
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "moe_shared_expert_intermediate_size", "n_group", "topk_group", "routed_scaling_factor",
    "moe_latent_size",
)  # fmt: skip
# Fields -> what older files call them.
_OLDER_NAMES = {
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "time_step_min": "mamba_dt_min",
    "time_step_max": "mamba_dt_max",
    "use_conv_bias": "mamba_conv_bias",
}


def _read(fields: Fields) -> LanguageModelConfig:
    width = fields.take("hidden_size", int, 4096)
    epsilon = fields.take("layer_norm_epsilon", float, 1e-5)
    fields.require("mlp_hidden_act", "relu2")
    fields.require("mamba_hidden_act", "silu", same=("swish",))
    fields.require("sliding_window", None)
    # transformers builds attention without biases, and a head of its own, whatever these say.
    fields.require("attention_bias", False)
    fields.require("tie_word_embeddings", False)
    # Heads that predict several tokens, which transformers leaves out.
    fields.ignore(
        "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern"
    )
    # Which logits a call returns, the loss, initial values, and how the same is computed.
    fields.ignore("num_logits_to_keep", "output_router_logits", "rescale_prenorm_residual")
    fields.ignore("use_mamba_kernels", "chunk_size", "mamba_chunk_size", "mamba_ssm_cache_dtype")
    fields.ignore("moe_shared_expert_overlap", "time_step_floor", "mamba_dt_init_floor")
    # Training only, or read by no code of transformers.
    fields.ignore("hidden_dropout", "expand", "mamba_expand", "mamba_proj_bias", "time_step_rank")
    fields.ignore("time_step_limit", "mamba_dt_limit", "num_query_groups", "rms_norm_eps")
    fields.ignore("residual_in_fp32", "n_shared_experts")
    layout = _read_layout(fields)
    hidden, experts = fields.take("intermediate_size", int, 21_504), None
    fields.ignore(*_OF_EXPERTS)
    if "experts" in layout:
        fields.require("mlp_bias", False)
        experts = _read_experts(fields)
    mixers = (
        _read_mamba2(fields, len(layout), epsilon),
        AttentionConfig(**read_heads(fields, width, 32, 8, 128), rotary_base=None),
    )
    return single_branch_language_model(
        layout,
        mixers,
        width,
        fields.take("vocab_size", int, 131_072),
        norm_epsilon=epsilon,
        mlp=hidden if "mlp" in layout else None,
        mlp_bias=fields.take("mlp_bias", bool, False),
        experts=experts,
    )


def _read_layout(fields: Fields) -> tuple[str, ...]:
    """What each block is, whose number any other field may contradict."""
    fields.ignore("num_hidden_layers")
    found: Any = fields.take("hybrid_override_pattern", str, None)
    for name in ("layer_types", "layers_block_type"):
        found = fields.take(name, list, None) or found
    kinds = _KINDS | _OLDER_KINDS
    for kind in found or ():
        if kind not in kinds:
            raise ValueError(
                f"{fields.source}: layers_block_type may hold only {', '.join(_KINDS)}, not "
                f"{kind!r}"
            )
    return tuple(kinds[kind] for kind in found or (RECURRENT, "moe", FULL, "mlp"))


def _take(fields: Fields, name: str, kind: Any, default: Any) -> Any:
    """A field, under its older name first."""
    value = fields.take(name, kind, default)
    return fields.take(_OLDER_NAMES[name], kind, value)


def _read_mamba2(fields: Fields, layers: int, epsilon: float) -> Mamba2Config:
    # The steps are clipped from below alone, and not as time_step_limit says.
    least = _take(fields, "time_step_min", float, 1e-3)
    return Mamba2Config(
        state_size=fields.take("ssm_state_size", int, 128),
        head_size=fields.take("mamba_head_dim", int, 64),
        num_heads=fields.take("mamba_num_heads", int, 128),
        groups=_take(fields, "n_groups", int, 8),
        conv_size=_take(fields, "conv_kernel", int, 4),
        dt_min=least,
        dt_max=_take(fields, "time_step_max", float, 1e-1),
        use_bias=fields.take("use_bias", bool, False),
        use_conv_bias=_take(fields, "use_conv_bias", bool, True),
        time_step_limit=(least, float("inf")),
        norm_epsilon=epsilon,
        layers=layers,
    )


def _read_experts(fields: Fields) -> ExpertsConfig:
    return ExpertsConfig(
        experts=fields.take("n_routed_experts", int, 8),
        chosen=fields.take("num_experts_per_tok", int, 2),
        hidden=fields.take("moe_intermediate_size", int, 7688),
        shared=fields.take("moe_shared_expert_intermediate_size", int, 7688),
        normalised=fields.take("norm_topk_prob", bool, True),
        scores="sigmoid",
        correction=True,
        groups=fields.take("n_group", int, 1),
        chosen_groups=fields.take("topk_group", int, 1),
        scale=fields.take("routed_scaling_factor", float, 1.0),
        latent=fields.take("moe_latent_size", int, None),
    )


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    stack = config.backbone
    mixers: dict[str, Any] = {mixer.mixer: mixer for mixer in stack.mixers}
    mamba = mixers.get("mamba2", Mamba2Config(num_heads=1, head_size=1))
    attention = mixers.get("attention", AttentionConfig(heads=1, rotary_base=None))
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": stack.width,
        "layers_block_type": [kinds[name] for name in stack.layout],
        **({} if stack.mlp is None else {"intermediate_size": stack.mlp}),
        **({} if stack.experts is None else _written_experts(stack.experts)),
        "mlp_bias": stack.mlp_bias,
        "mlp_hidden_act": "relu2",
        **written_heads(attention),
        "head_dim": attention.head_size or stack.width // attention.heads,
        "ssm_state_size": mamba.state_size,
        "mamba_head_dim": mamba.head_size,
        "mamba_num_heads": mamba.heads(stack.width),
        "n_groups": mamba.groups,
        "conv_kernel": mamba.conv_size,
        "time_step_min": mamba.time_step_limit[0],
        "time_step_max": mamba.dt_max,
        "use_bias": mamba.use_bias,
        "use_conv_bias": mamba.use_conv_bias,
        "layer_norm_epsilon": stack.norm_epsilon or 1e-6,
        "tie_word_embeddings": False,
    }


def _written_experts(experts: ExpertsConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": experts.experts,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.hidden,
        "moe_shared_expert_intermediate_size": experts.shared,
        "norm_topk_prob": experts.normalised,
        "n_group": experts.groups,
        "topk_group": experts.chosen_groups,
        "routed_scaling_factor": experts.scale,
        "moe_latent_size": experts.latent,
    }


NEMOTRON_H = Family(
    "nemotron_h",
    "NemotronHForCausalLM",
    frozenset(_KINDS.values()),
    _read,
    _write,
    NAMES,
    frozenset({
        "backbone.norm_epsilon", "mixer.kv_heads", "mixer.head_size", "mixer.num_heads",
        "mixer.expand",
    }),
    experts_apart=True,
)  # fmt: skip
