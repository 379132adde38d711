"""Jamba in transformers' layout: Mamba with norms inside, some attention, experts in some layers.

Lieber et al., "Jamba: A Hybrid Transformer-Mamba Language Model", 2024 (arXiv:2403.19887).
"""

from collections.abc import Collection
from typing import Any

from seqmodels.interop.attention import read_heads, written_heads
from seqmodels.interop.families import HEAD, Family
from seqmodels.interop.fields import Fields
from seqmodels.layers.experts import ExpertsConfig
from seqmodels.mixers import AttentionConfig, MambaConfig
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import hybrid_language_model

_EXPERT = "backbone/block_{}/experts/expert_{}/"
_THEIR_EXPERT = "model.layers.{}.feed_forward.experts.{}."
NAMES = (
    ("embedding/embedding", "model.embed_tokens.weight"),
    ("backbone/final_norm/rms/", "model.final_layernorm."),
    ("backbone/block_{}/norm/rms/", "model.layers.{}.input_layernorm."),
    ("backbone/block_{}/mlp_norm/rms/", "model.layers.{}.pre_ff_layernorm."),
    ("backbone/block_{}/mamba/", "model.layers.{}.mamba."),
    ("backbone/block_{}/attention/", "model.layers.{}.self_attn."),
    ("backbone/block_{}/mlp_gate/", "model.layers.{}.feed_forward.gate_proj."),
    ("backbone/block_{}/mlp_in/", "model.layers.{}.feed_forward.up_proj."),
    ("backbone/block_{}/mlp_out/", "model.layers.{}.feed_forward.down_proj."),
    ("backbone/block_{}/experts/router/", "model.layers.{}.feed_forward.router."),
    (_EXPERT + "w_gate", _THEIR_EXPERT + "gate_proj.weight"),
    (_EXPERT + "w_in", _THEIR_EXPERT + "up_proj.weight"),
    (_EXPERT + "w_out", _THEIR_EXPERT + "down_proj.weight"),
    ("head/kernel", HEAD),
)


def _read(fields: Fields) -> LanguageModelConfig:
    width, layers = fields.take("hidden_size", int, 4096), fields.take("num_hidden_layers", int, 32)
    epsilon = fields.take("rms_norm_eps", float, 1e-6)
    fields.require("hidden_act", "silu", same=("swish",))
    fields.require("mamba_inner_layernorms", True)
    # Which logits a call returns, the loss, and which of transformers' codes computes the same.
    fields.ignore("num_logits_to_keep", "calc_logits_for_entire_prompt")
    fields.ignore("router_aux_loss_coef", "output_router_logits")
    fields.ignore("use_mamba_kernels", "use_mambapy", "use_associative_scan")
    attended = _chosen(fields, "attn", layers, 8, 4)
    experts = fields.take("num_experts", int, 16)
    hidden = fields.take("intermediate_size", int, 14_336)
    sparse = _chosen(fields, "expert", layers, 2, 1)
    sparse = sparse if experts > 1 else set()
    chosen = fields.take("num_experts_per_tok", int, 2)
    dense = tuple(layer for layer in range(layers) if layer not in sparse)
    mamba = MambaConfig(
        state_size=fields.take("mamba_d_state", int, 16),
        expand=fields.take("mamba_expand", int, 2),
        conv_size=fields.take("mamba_d_conv", int, 4),
        dt_rank=fields.take_size("mamba_dt_rank"),
        use_bias=fields.take("mamba_proj_bias", bool, False),
        use_conv_bias=fields.take("mamba_conv_bias", bool, True),
        mixer_rms_eps=epsilon,
        mixer_rms_scales=True,
        layers=layers,
    )
    attention = AttentionConfig(**read_heads(fields, width, 32, 8), rotary_base=None)
    return hybrid_language_model(
        tuple("attention" if layer in attended else "mamba" for layer in range(layers)),
        (mamba, attention),
        width,
        hidden if dense else None,
        fields.take("vocab_size", int, 65_536),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        norm_epsilon=epsilon,
        experts=ExpertsConfig(experts, chosen, hidden, normalised=False) if sparse else None,
        dense_blocks=dense if sparse else (),
    )


def _chosen(fields: Fields, what: str, layers: int, period: int, offset: int) -> set[int]:
    """Layers ``offset``, ``offset + period``, ...; the last two arguments are defaults."""
    period = fields.take(f"{what}_layer_period", int, period)
    offset = fields.take(f"{what}_layer_offset", int, offset)
    if not 0 <= offset < period:
        raise ValueError(
            f"{fields.source}: {what}_layer_offset={offset} must be below {what}_layer_period="
            f"{period} and not negative"
        )
    return set(range(offset, layers, period))


def _period(chosen: Collection[int], layers: int, what: str) -> dict[str, int]:
    """The inverse of ``_chosen``."""
    found = next(
        (
            (period, offset)
            for period in range(1, layers + 2)
            for offset in range(period)
            if set(range(offset, layers, period)) == set(chosen)
        ),
        None,
    )
    if found is None:
        raise ValueError(
            f"as a jamba model: the {what} layers {sorted(chosen)} of {layers} must be every n-th"
        )
    return {f"{what}_layer_period": found[0], f"{what}_layer_offset": found[1]}


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    stack = config.backbone
    layers, experts = len(stack.layout), stack.experts
    mixers: dict[str, Any] = {mixer.mixer: mixer for mixer in stack.mixers}
    mamba = mixers.get("mamba", MambaConfig(mixer_rms_eps=1e-6, mixer_rms_scales=True))
    attention = mixers.get("attention", AttentionConfig(heads=1, rotary_base=None))
    attended = [layer for layer, name in enumerate(stack.layout) if name == "attention"]
    sparse = [layer for layer in range(layers) if stack.second(layer) == "experts"]
    written = {
        "vocab_size": config.vocabulary_size,
        "hidden_size": stack.width,
        "intermediate_size": stack.mlp if experts is None else experts.hidden,
        "num_hidden_layers": layers,
        **_period(attended, layers, "attn"),
        **_period(sparse, layers, "expert"),
        **written_heads(attention),
        "num_experts": 1 if experts is None else experts.experts,
        "num_experts_per_tok": 1 if experts is None else experts.chosen,
        "mamba_d_state": mamba.state_size,
        "mamba_expand": mamba.expand,
        "mamba_d_conv": mamba.conv_size,
        "mamba_dt_rank": mamba.dt_rank or -(-stack.width // 16),
        "mamba_proj_bias": mamba.use_bias,
        "mamba_conv_bias": mamba.use_conv_bias,
        "rms_norm_eps": stack.norm_epsilon or 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
    }
    size = attention.head_size
    return written if size is None else written | {"head_dim": size}


JAMBA = Family(
    "jamba",
    "JambaForCausalLM",
    frozenset({"mamba", "attention"}),
    _read,
    _write,
    NAMES,
    frozenset({
        "backbone.norm_epsilon", "mixer.dt_rank", "mixer.kv_heads", "mixer.head_size",
    }),
    experts_apart=True,
)  # fmt: skip
