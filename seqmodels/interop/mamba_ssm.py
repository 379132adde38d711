"""Mamba and Mamba-2 in the layout of mamba_ssm, the code of their papers.

Its tensors are called as in transformers but for ``backbone.embedding``; see ``spellings``.
"""

from typing import Any

from seqmodels.interop.families import Family
from seqmodels.interop.fields import Fields
from seqmodels.interop.mamba import FIRST, NAMES, SECOND, step_limits
from seqmodels.mixers import Mamba2Config, MambaConfig
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.published import mamba_language_model

_EPSILON = 1e-5  # of every norm; no config.json says it


def native_family(fields: Fields) -> Family | None:
    """The family of a config.json that mamba_ssm wrote; None for any other."""
    if "model_type" in fields.values or not {"d_model", "n_layer"} <= fields.values.keys():
        return None
    layer = _mixer_fields(fields).take("layer", str, "Mamba1")
    if layer not in _FAMILIES:
        raise ValueError(
            f"{fields.source}: ssm_cfg.layer={layer!r} is not known; one of {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[layer]


def _mixer_fields(fields: Fields) -> Fields:
    return Fields(fields.take("ssm_cfg", dict, {}), f"{fields.source}: ssm_cfg")


def _read(fields: Fields) -> LanguageModelConfig:
    width, layers = fields.take("d_model", int), fields.take("n_layer", int)
    fields.require("rms_norm", True)
    fields.require("d_intermediate", 0)
    fields.require("attn_layer_idx", [])
    fields.ignore("attn_cfg", "fused_add_norm", "initializer_cfg")
    multiple = fields.take("pad_vocab_size_multiple", int, 8)
    if multiple < 1:
        raise ValueError(f"{fields.source}: pad_vocab_size_multiple={multiple} must be positive")
    inner = _mixer_fields(fields)
    second = inner.take("layer", str, "Mamba1") == "Mamba2"
    mixer = _mamba2(inner, width, layers) if second else _mamba(inner, layers)
    inner.finish()
    return mamba_language_model(
        width,
        layers,
        mixer,
        -(-fields.take("vocab_size", int) // multiple) * multiple,
        tie_embeddings=fields.take("tie_embeddings", bool, True),
        norm_epsilon=_EPSILON,
        float32_residual=fields.take("residual_in_fp32", bool, True),
    )


def _shared(inner: Fields, layers: int) -> dict[str, Any]:
    """What the mixers of both generations have."""
    inner.ignore("dt_init_floor")
    return {
        "expand": inner.take("expand", int, 2),
        "conv_size": inner.take("d_conv", int, 4),
        "use_bias": inner.take("bias", bool, False),
        "use_conv_bias": inner.take("conv_bias", bool, True),
        "dt_min": inner.take("dt_min", float, 1e-3),
        "dt_max": inner.take("dt_max", float, 1e-1),
        "layers": layers,
    }


def _mamba(inner: Fields, layers: int) -> MambaConfig:
    inner.ignore("dt_init", "dt_scale", "use_fast_path")
    automatic = inner.values.get("dt_rank", "auto") == "auto"
    rank = None if automatic else inner.take("dt_rank", int)
    inner.ignore("dt_rank")
    return MambaConfig(
        **_shared(inner, layers), state_size=inner.take("d_state", int, 16), dt_rank=rank
    )


def _mamba2(inner: Fields, width: int, layers: int) -> Mamba2Config:
    inner.ignore("A_init_range", "conv_init", "chunk_size", "use_mem_eff_path")
    inner.require("norm_before_gate", False)
    inner.require("rmsnorm", True)
    inner.require("D_has_hdim", False)
    shared = _shared(inner, layers)
    inner.require("d_ssm", None, same=(shared["expand"] * width,))
    return Mamba2Config(
        **shared,
        state_size=inner.take("d_state", int, 128),
        head_size=inner.take("headdim", int, 64),
        groups=inner.take("ngroups", int, 1),
        time_step_limit=step_limits(inner, "dt_limit"),
        norm_epsilon=_EPSILON,
    )


def _write(config: LanguageModelConfig) -> dict[str, Any]:
    stack, mixer = config.backbone, config.backbone.mixers[0]
    assert isinstance(mixer, MambaConfig | Mamba2Config)
    inner: dict[str, Any] = {
        "layer": "Mamba1",
        "d_state": mixer.state_size,
        "expand": mixer.expand,
        "d_conv": mixer.conv_size,
        "bias": mixer.use_bias,
        "conv_bias": mixer.use_conv_bias,
        "dt_min": mixer.dt_min,
        "dt_max": mixer.dt_max,
    }
    if isinstance(mixer, Mamba2Config):
        inner |= {
            "layer": "Mamba2",
            "headdim": mixer.head_size,
            "ngroups": mixer.groups,
            "dt_limit": list(mixer.time_step_limit),
        }
    else:
        inner["dt_rank"] = mixer.dt_rank or "auto"
    return {
        "d_model": stack.width,
        "n_layer": len(stack.layout),
        "vocab_size": config.vocabulary_size,
        "ssm_cfg": inner,
        "residual_in_fp32": stack.float32_residual,
        "tie_embeddings": config.tie_embeddings,
    }


_HEAD_MODEL = "MambaLMHeadModel"
_FAMILIES = {
    "Mamba1": Family("mamba", _HEAD_MODEL, FIRST, _read, _write, NAMES),
    "Mamba2": Family("mamba2", _HEAD_MODEL, SECOND, _read, _write, NAMES),
}
