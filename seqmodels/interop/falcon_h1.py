"""Falcon-H1 in transformers' layout: Mamba-2 and attention side by side in every block.

Zuo et al., "Falcon-H1: A Family of Hybrid-Head Language Models", 2025 (arXiv:2507.22448).
"""

from typing import Any

from seqmodels.interop.attention import read_heads, read_rotary, written_heads, written_rotary
from seqmodels.interop.families import HEAD, Family
from seqmodels.interop.fields import Fields
from seqmodels.interop.mamba import step_limits
from seqmodels.mixers import AttentionConfig, Mamba2Config, ParallelConfig
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import hybrid_language_model

_BLOCK, _THEIR_BLOCK = "backbone/block_{}/", "model.layers.{}."
NAMES = (
    ("embedding/embedding", "model.embed_tokens.weight"),
    ("backbone/final_norm/rms/", "model.final_layernorm."),
    (_BLOCK + "norm/rms/", _THEIR_BLOCK + "input_layernorm."),
    (_BLOCK + "mlp_norm/rms/", _THEIR_BLOCK + "pre_ff_layernorm."),
    (_BLOCK + "mlp_gate/", _THEIR_BLOCK + "feed_forward.gate_proj."),
    (_BLOCK + "mlp_in/", _THEIR_BLOCK + "feed_forward.up_proj."),
    (_BLOCK + "mlp_out/", _THEIR_BLOCK + "feed_forward.down_proj."),
    (_BLOCK + "mixer/mamba2/", _THEIR_BLOCK + "mamba."),
    (_BLOCK + "mixer/attention/", _THEIR_BLOCK + "self_attn."),
    ("head/kernel", HEAD),
)


def _read(fields: Fields) -> LanguageModelConfig:
    width, layers = fields.take("hidden_size", int, 4096), fields.take("num_hidden_layers", int, 32)
    epsilon = fields.take("rms_norm_eps", float, 1e-5)
    fields.require("hidden_act", "silu", same=("swish",))
    # Which logits a call returns, and how the same is computed.
    fields.ignore("num_logits_to_keep", "mamba_chunk_size")
    # Of the first files, read by no code of transformers.
    fields.ignore("mamba_use_mlp", "mlp_expansion_factor", "attn_layer_indices")
    mixer = ParallelConfig(
        (_read_mamba2(fields, width, layers, epsilon), _read_attention(fields, width)),
        in_scales=_scales(fields, "ssm_in_multiplier", "attention_in_multiplier"),
        out_scales=_scales(fields, "ssm_out_multiplier", "attention_out_multiplier"),
    )
    return hybrid_language_model(
        ("parallel",) * layers,
        (mixer,),
        width,
        fields.take("intermediate_size", int, 14_336),
        fields.take("vocab_size", int, 128_000),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        norm_epsilon=epsilon,
        mlp_bias=fields.take("mlp_bias", bool, False),
        mlp_scales=_numbers(fields, "mlp_multipliers", 2) or (1.0, 1.0),
        embedding_scale=fields.take("embedding_multiplier", float, 1.0),
        logit_scale=fields.take("lm_head_multiplier", float, 1.0),
    )


def _scales(fields: Fields, *names: str) -> tuple[float, ...]:
    return tuple(fields.take(name, float, 1.0) for name in names)


def _numbers(fields: Fields, name: str, count: int) -> Any:
    """A list of so many numbers; None where there is none."""
    found = fields.take(name, list, None)
    if found is None:
        return None
    if len(found) != count or not all(type(number) in (int, float) for number in found):
        raise ValueError(f"{fields.source}: {name}={found!r} must be {count} numbers")
    return tuple(map(float, found))


def _read_attention(fields: Fields, width: int) -> AttentionConfig:
    heads = read_heads(fields, width, 32, 8)
    base, fraction = read_rotary(fields)
    size = heads["head_size"] or width // heads["heads"]
    scale = fields.take("key_multiplier", float, 1.0)
    return AttentionConfig(
        **heads,
        rotary_base=base,
        rotary_fraction=fraction,
        score_scale=None if scale == 1.0 else scale * size**-0.5,
        use_bias=fields.take("attention_bias", bool, False),
    )


def _read_mamba2(fields: Fields, width: int, layers: int, epsilon: float) -> Mamba2Config:
    heads, expand = fields.take("mamba_n_heads", int, 128), fields.take("mamba_expand", int, 2)
    inner = expand * width
    if fields.values.get("mamba_d_ssm", 1024) is not None:
        inner = fields.take("mamba_d_ssm", int, 1024)
    fields.ignore("mamba_d_ssm")
    size = fields.take_size("mamba_d_head")
    size = inner // max(heads, 1) if size is None else size
    if heads * size != inner:
        raise ValueError(
            f"{fields.source}: mamba_n_heads * mamba_d_head = {heads * size} must be mamba_d_ssm = "
            f"{inner}"
        )
    bias = fields.take("mamba_proj_bias", bool, False)
    fields.require("projectors_bias", bias)
    before = fields.take("mamba_norm_before_gate", bool, True)
    norm = "before_gate" if before else "after_gate"
    return Mamba2Config(
        state_size=fields.take("mamba_d_state", int, 256),
        head_size=size,
        num_heads=heads,
        groups=fields.take("mamba_n_groups", int, 1),
        conv_size=fields.take("mamba_d_conv", int, 4),
        use_bias=bias,
        use_conv_bias=fields.take("mamba_conv_bias", bool, True),
        time_step_limit=step_limits(fields, "time_step_limit"),
        norm_epsilon=epsilon,
        norm=norm if fields.take("mamba_rms_norm", bool, False) else None,  # type: ignore[arg-type]
        part_scales=_numbers(fields, "ssm_multipliers", 5),
        layers=layers,
    )


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    stack = config.backbone
    both = stack.mixers[0]
    assert isinstance(both, ParallelConfig)
    scales = dict(zip((mixer.mixer for mixer in both.mixers), both.scales(), strict=True))
    mixers: dict[str, Any] = {mixer.mixer: mixer for mixer in both.mixers}
    if [*mixers] != ["mamba2", "attention"]:
        raise ValueError(f"as a falcon_h1 model: mixers={[*mixers]} must be mamba2, attention")
    mamba, attention = mixers["mamba2"], mixers["attention"]
    size = attention.head_size or stack.width // attention.heads
    scale = 1.0 if attention.score_scale is None else attention.score_scale * size**0.5
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": stack.width,
        "intermediate_size": stack.mlp,
        "num_hidden_layers": len(stack.layout),
        **written_heads(attention),
        "head_dim": size,
        "attention_bias": attention.use_bias,
        **written_rotary(attention),
        "key_multiplier": scale,
        "attention_in_multiplier": scales["attention"][0],
        "attention_out_multiplier": scales["attention"][1],
        "ssm_in_multiplier": scales["mamba2"][0],
        "ssm_out_multiplier": scales["mamba2"][1],
        "ssm_multipliers": None if mamba.part_scales is None else list(mamba.part_scales),
        "mlp_multipliers": list(stack.mlp_scales),
        "mlp_bias": stack.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "lm_head_multiplier": config.logit_scale,
        "mamba_d_ssm": mamba.inner(stack.width),
        "mamba_n_heads": mamba.heads(stack.width),
        "mamba_d_head": mamba.head_size,
        "mamba_d_state": mamba.state_size,
        "mamba_n_groups": mamba.groups,
        "mamba_d_conv": mamba.conv_size,
        "mamba_proj_bias": mamba.use_bias,
        "projectors_bias": mamba.use_bias,
        "mamba_conv_bias": mamba.use_conv_bias,
        "mamba_rms_norm": mamba.norm is not None,
        "mamba_norm_before_gate": mamba.norm == "before_gate",
        "time_step_limit": list(mamba.time_step_limit),
        "rms_norm_eps": stack.norm_epsilon or 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
    }


FALCON_H1 = Family(
    "falcon_h1",
    "FalconH1ForCausalLM",
    frozenset({"parallel"}),
    _read,
    _write,
    NAMES,
    frozenset({
        "backbone.norm_epsilon", "mixer.kv_heads", "mixer.head_size", "mixer.score_scale",
        "mixer.num_heads", "mixer.expand", "mixer.in_scales", "mixer.out_scales",
    }),
)  # fmt: skip
