"""Language models at their published sizes."""

from typing import Any, Literal

import jax.numpy as jnp

from seqmodels.layers.experts import ExpertsConfig
from seqmodels.mixers import (
    HyenaConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    MonarchConfig,
    RGLRUConfig,
    SlidingWindowConfig,
    hyena,
    mamba,
    mamba2,
    monarch,
    rg_lru,
)
from seqmodels.models.backbone import BackboneConfig
from seqmodels.models.language import LanguageModelConfig
from seqmodels.models.layouts import layout


def mamba_language_model(
    width: int,
    layers: int,
    mixer: MambaConfig | Mamba2Config,
    vocabulary_size: int,
    *,
    tie_embeddings: bool = True,
    norm_epsilon: float = 1e-5,
    float32_residual: bool = True,
) -> LanguageModelConfig:
    """Mamba, Mamba-2, Falcon Mamba: norm, mixer, residual; no MLP."""
    backbone = _one_mixer(
        width,
        layers,
        mixer,
        norm="rms",
        norm_epsilon=norm_epsilon,
        float32_residual=float32_residual,
        final_norm=True,
    )
    return LanguageModelConfig(backbone, vocabulary_size, tie_embeddings=tie_embeddings)


def griffin_language_model(
    layout: tuple[str, ...],
    mixers: tuple[MixerConfig, ...],
    width: int,
    mlp: int,
    vocabulary_size: int,
    *,
    tie_embeddings: bool = True,
    norm_epsilon: float = 1e-6,
    logit_cap: float = 30.0,
) -> LanguageModelConfig:
    """RecurrentGemma: blocks of "rg_lru" and "sliding_window", each with a gated MLP."""
    backbone = BackboneConfig(
        layout=layout,
        mixers=mixers,
        width=width,
        norm="zero_centered_rms",
        norm_epsilon=norm_epsilon,
        final_norm=True,
        mlp=mlp,
        mlp_kind="geglu",
    )
    return LanguageModelConfig(
        backbone,
        vocabulary_size,
        tie_embeddings=tie_embeddings,
        embedding_scale=gemma_embedding_scale(width),
        logit_cap=logit_cap,
    )


def hybrid_language_model(
    layout: tuple[str, ...],
    mixers: tuple[MixerConfig, ...],
    width: int,
    mlp: int | None,
    vocabulary_size: int,
    *,
    tie_embeddings: bool,
    norm_epsilon: float,
    norm: Literal["rms", "zero_centered_rms"] = "rms",
    mlp_bias: bool = False,
    mlp_scales: tuple[float, float] = (1.0, 1.0),
    experts: ExpertsConfig | None = None,
    dense_blocks: tuple[int, ...] = (),
    residual_scale: float = 1.0,
    embedding_scale: float = 1.0,
    logit_scale: float = 1.0,
) -> LanguageModelConfig:
    """Qwen's hybrids, LFM2, Bamba, Granite 4, Jamba, Falcon-H1.

    In each block a mixer, then a SwiGLU MLP or experts.
    """
    backbone = BackboneConfig(
        layout=layout,
        mixers=tuple(config for config in mixers if config.mixer in layout),
        width=width,
        norm=norm,
        norm_epsilon=norm_epsilon,
        residual_scale=residual_scale,
        final_norm=True,
        mlp=mlp,
        mlp_kind="swiglu",
        mlp_bias=mlp_bias,
        mlp_scales=mlp_scales,
        experts=experts,
        dense_blocks=dense_blocks,
    )
    return LanguageModelConfig(
        backbone,
        vocabulary_size,
        tie_embeddings=tie_embeddings,
        embedding_scale=embedding_scale,
        logit_scale=logit_scale,
    )


def single_branch_language_model(
    layout: tuple[str, ...],
    mixers: tuple[MixerConfig, ...],
    width: int,
    vocabulary_size: int,
    *,
    norm_epsilon: float,
    mlp: int | None = None,
    mlp_bias: bool = False,
    experts: ExpertsConfig | None = None,
) -> LanguageModelConfig:
    """Nemotron-H: a mixer, a squared-ReLU MLP ("mlp") or "experts" in each block."""
    backbone = BackboneConfig(
        layout=layout,
        mixers=tuple(config for config in mixers if config.mixer in layout),
        width=width,
        single=True,
        norm="rms",
        norm_epsilon=norm_epsilon,
        final_norm=True,
        mlp=mlp,
        mlp_kind="relu2",
        mlp_bias=mlp_bias,
        experts=experts,
    )
    return LanguageModelConfig(backbone, vocabulary_size, tie_embeddings=False)


def m2_bert(
    width: int, layers: int, mixer: MonarchConfig, vocabulary_size: int
) -> LanguageModelConfig:
    """M2-BERT: Monarch mixers and block-diagonal gated MLPs, a norm after each; it sees both sides.

    Train it by ``seqmodels.training.masked``.
    """
    backbone = _one_mixer(
        width,
        layers,
        mixer,
        norm="layer",
        norm_epsilon=1e-12,
        prenorm=False,
        mlp=4 * width,
        mlp_kind="geglu",
        mlp_blocks=4,
    )
    return LanguageModelConfig(backbone, vocabulary_size)


def hyena_language_model(
    width: int, layers: int, mixer: HyenaConfig, vocabulary_size: int
) -> LanguageModelConfig:
    """Hyena: norm, operator, residual, then an MLP twice as wide; no positions."""
    backbone = _one_mixer(
        width,
        layers,
        mixer,
        norm="layer",
        float32_residual=True,
        final_norm=True,
        mlp=2 * width,
        mlp_bias=True,
    )
    return LanguageModelConfig(backbone, vocabulary_size)


def _one_mixer(width: int, layers: int, mixer: MixerConfig, **fields: Any) -> BackboneConfig:
    """Blocks that all hold the same mixer; ``fields`` are the backbone's others."""
    return BackboneConfig(layout=(mixer.mixer,) * layers, mixers=(mixer,), width=width, **fields)


def gemma_embedding_scale(width: int) -> float:
    """``sqrt(width)``, rounded to bfloat16 as Gemma's models have it."""
    return float(jnp.bfloat16(width**0.5))


def _recurrent_gemma(width: int, _: int, recurrent: RGLRUConfig, mlp: int) -> LanguageModelConfig:
    attention = SlidingWindowConfig(
        heads=recurrent.heads,
        kv_heads=1,
        rotary_fraction=0.5,
        window=2048,
        use_out_bias=True,
    )
    blocks = layout("griffin", recurrent.layers)
    return griffin_language_model(blocks, (recurrent, attention), width, mlp, 256_000)


PUBLISHED: dict[str, LanguageModelConfig] = {
    "mamba-130m": mamba_language_model(*mamba.MAMBA_130M, 50_280),
    "mamba-370m": mamba_language_model(*mamba.MAMBA_370M, 50_280),
    "mamba-790m": mamba_language_model(*mamba.MAMBA_790M, 50_280),
    "mamba-1.4b": mamba_language_model(*mamba.MAMBA_1_4B, 50_280),
    "mamba-2.8b": mamba_language_model(*mamba.MAMBA_2_8B, 50_280),
    "mamba2-130m": mamba_language_model(*mamba2.MAMBA2_130M, 50_288),
    "mamba2-370m": mamba_language_model(*mamba2.MAMBA2_370M, 50_288),
    "mamba2-780m": mamba_language_model(*mamba2.MAMBA2_780M, 50_288),
    "mamba2-1.3b": mamba_language_model(*mamba2.MAMBA2_1_3B, 50_288),
    "mamba2-2.7b": mamba_language_model(*mamba2.MAMBA2_2_7B, 50_288),
    "codestral-mamba-7b": mamba_language_model(
        *mamba2.CODESTRAL_MAMBA_7B, 32_768, tie_embeddings=False
    ),
    "falcon-mamba-7b": mamba_language_model(
        *mamba.FALCON_MAMBA_7B, 65_024, tie_embeddings=False
    ),
    "recurrentgemma-2b": _recurrent_gemma(*rg_lru.RECURRENTGEMMA_2B, 7_680),
    "recurrentgemma-9b": _recurrent_gemma(*rg_lru.RECURRENTGEMMA_9B, 12_288),
}  # fmt: skip
"""Names as published: state-spaces/mamba-*, state-spaces/mamba2-*, mistralai's Codestral Mamba,
tiiuae/falcon-mamba-7b, google/recurrentgemma-*; the window is that of transformers' version, in
which a token sees itself and 2047 others."""

BY_SIZE: dict[str, LanguageModelConfig] = {
    "hyena-153m": hyena_language_model(*hyena.HYENA_153M, 50_264),
    "m2-bert-80m": m2_bert(*monarch.M2_BERT_80M, 30_528),
    "m2-bert-110m": m2_bert(*monarch.M2_BERT_110M, 30_528),
}
"""Models that transformers does not have, by their published numbers of parameters. M2-BERT sees
both sides."""
