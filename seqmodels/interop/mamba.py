"""Mamba, Falcon Mamba and Mamba-2 in transformers' layout."""

from typing import Any

from seqmodels.interop.families import HEAD, Family
from seqmodels.interop.fields import Fields
from seqmodels.mixers import Mamba2Config, MambaConfig
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import mamba_language_model

NAMES = (
    ("embedding/embedding", "backbone.embeddings.weight"),
    ("backbone/final_norm/rms/", "backbone.norm_f."),
    ("backbone/block_{}/norm/rms/", "backbone.layers.{}.norm."),
    ("backbone/block_{}/mixer/", "backbone.layers.{}.mixer."),
    ("head/kernel", HEAD),
)
_FALCON_EPSILON = 1e-6


def _shared(fields: Fields) -> dict[str, Any]:
    """What the mixers of both generations have."""
    fields.require("hidden_act", "silu", same=("swish",))
    # Initial values only.
    fields.ignore("rescale_prenorm_residual", "time_step_floor", "time_step_rank")
    fields.ignore("time_step_init_scheme", "time_step_scale")
    # Which of transformers' codes computes the same.
    fields.ignore("use_associative_scan", "use_falcon_mambapy", "use_mambapy")
    # Fields of the original configuration that conversions kept and transformers never reads.
    fields.ignore("d_model", "d_inner", "n_layer", "ssm_cfg", "fused_add_norm", "rms_norm")
    fields.ignore("pad_vocab_size_multiple")
    return {
        "conv_size": fields.take("conv_kernel", int, 4),
        "use_bias": fields.take("use_bias", bool, False),
        "use_conv_bias": fields.take("use_conv_bias", bool, True),
        "dt_min": fields.take("time_step_min", float, 1e-3),
        "dt_max": fields.take("time_step_max", float, 1e-1),
        "layers": fields.take("num_hidden_layers", int, 32),
    }


def _model(
    fields: Fields, mixer: Any, width: int, *, vocabulary: int, tied: bool
) -> LanguageModelConfig:
    return mamba_language_model(
        width,
        mixer.layers,
        mixer,
        fields.take("vocab_size", int, vocabulary),
        tie_embeddings=fields.take("tie_word_embeddings", bool, tied),
        norm_epsilon=fields.take("layer_norm_epsilon", float, 1e-5),
        float32_residual=fields.take("residual_in_fp32", bool, True),
    )


def _read_mamba(fields: Fields, epsilon: float | None = None) -> LanguageModelConfig:
    width = fields.take("hidden_size", int, 768)
    inner = fields.take("intermediate_size", int, None)
    if inner is None:
        inner = fields.take("expand", int, 2) * width
    fields.ignore("expand")
    if width < 1 or inner % width:
        raise ValueError(
            f"{fields.source}: intermediate_size={inner} must be a multiple of hidden_size={width}"
        )
    mixer = MambaConfig(
        **_shared(fields),
        state_size=fields.take("state_size", int, 16),
        expand=inner // width,
        dt_rank=fields.take_size("time_step_rank"),
        mixer_rms_eps=epsilon,
    )
    return _model(fields, mixer, width, vocabulary=50_280, tied=True)


def _read_falcon(fields: Fields) -> LanguageModelConfig:
    return _read_mamba(fields, fields.take("mixer_rms_eps", float, _FALCON_EPSILON))


def step_limits(fields: Fields, name: str) -> tuple[float, float]:
    """The least and the greatest step size."""
    limits = fields.take(name, list, [0.0, float("inf")])
    if len(limits) != 2 or not all(type(limit) in (int, float) for limit in limits):
        raise ValueError(f"{fields.source}: {name}={limits!r} is not a pair of numbers")
    return float(limits[0]), float(limits[1])


def _read_mamba2(fields: Fields) -> LanguageModelConfig:
    width, expand = fields.take("hidden_size", int, 4096), fields.take("expand", int, 2)
    heads, size = fields.take("num_heads", int, 128), fields.take("head_dim", int, 64)
    if heads * size != expand * width:
        raise ValueError(
            f"{fields.source}: num_heads * head_dim = {heads * size} must be expand * hidden_size "
            f"= {expand * width}"
        )
    # transformers gates, then normalises; older versions wrote the first two and read neither.
    fields.ignore("norm_before_gate", "rmsnorm", "chunk_size", "intermediate_size")
    limits = step_limits(fields, "time_step_limit")
    mixer = Mamba2Config(
        **_shared(fields),
        state_size=fields.take("state_size", int, 128),
        expand=expand,
        head_size=size,
        groups=fields.take("n_groups", int, 8),
        time_step_limit=limits,
        norm_epsilon=fields.take("layer_norm_epsilon", float, 1e-5),
    )
    return _model(fields, mixer, width, vocabulary=32_768, tied=False)


def _written(config: LanguageModelConfig) -> dict[str, Any]:
    """The fields that both generations have."""
    stack = config.backbone
    mixer: Any = stack.mixers[0]
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": stack.width,
        "num_hidden_layers": len(stack.layout),
        "layer_norm_epsilon": stack.norm_epsilon or 1e-6,
        "residual_in_fp32": stack.float32_residual,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "state_size": mixer.state_size,
        "expand": mixer.expand,
        "conv_kernel": mixer.conv_size,
        "use_bias": mixer.use_bias,
        "use_conv_bias": mixer.use_conv_bias,
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
    }


def _write_mamba(config: LanguageModelConfig) -> dict[str, Any]:
    mixer, width = config.backbone.mixers[0], config.backbone.width
    assert isinstance(mixer, MambaConfig)
    return _written(config) | {
        "intermediate_size": mixer.expand * width,
        "time_step_rank": mixer.dt_rank or -(-width // 16),
    }


def _write_falcon(config: LanguageModelConfig) -> dict[str, Any]:
    mixer = config.backbone.mixers[0]
    assert isinstance(mixer, MambaConfig)
    return _write_mamba(config) | {"mixer_rms_eps": mixer.mixer_rms_eps}


def _write_mamba2(config: LanguageModelConfig) -> dict[str, Any]:
    mixer = config.backbone.mixers[0]
    assert isinstance(mixer, Mamba2Config)
    return _written(config) | {
        "num_heads": mixer.heads(config.backbone.width),
        "head_dim": mixer.head_size,
        "n_groups": mixer.groups,
        "time_step_limit": list(mixer.time_step_limit),
    }


_IMPLIED = frozenset({"backbone.norm_epsilon", "mixer.dt_rank"})
FIRST, SECOND = frozenset({"mamba"}), frozenset({"mamba2"})
MAMBA = Family("mamba", "MambaForCausalLM", FIRST, _read_mamba, _write_mamba, NAMES, _IMPLIED)
FALCON_MAMBA = Family(
    "falcon_mamba", "FalconMambaForCausalLM", FIRST, _read_falcon, _write_falcon, NAMES, _IMPLIED
)
MAMBA2 = Family("mamba2", "Mamba2ForCausalLM", SECOND, _read_mamba2, _write_mamba2, NAMES, _IMPLIED)
