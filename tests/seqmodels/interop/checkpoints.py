"""Tiny checkpoints of every family, and how they are compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.layers.experts import ExpertsConfig
from seqmodels.mixers import (
    AttentionConfig,
    GatedConvConfig,
    GatedDeltaNetConfig,
    Mamba2Config,
    MambaConfig,
    ParallelConfig,
    RGLRUConfig,
    SlidingWindowConfig,
)
from seqmodels.models.published import (
    griffin_language_model,
    hybrid_language_model,
    mamba_language_model,
    single_branch_language_model,
)
from tests.pytorch import torch, transformers

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
MAMBA2 = {
    "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8,
}  # fmt: skip
CONFIGS = {
    "mamba": transformers.MambaConfig(**SIZES, state_size=4, use_bias=True, time_step_rank=3),
    "falcon_mamba": transformers.FalconMambaConfig(
        **SIZES, state_size=4, use_conv_bias=False, tie_word_embeddings=False, mixer_rms_eps=1e-3
    ),
    "mamba2": transformers.Mamba2Config(
        **SIZES, state_size=8, num_heads=4, head_dim=8, n_groups=2, chunk_size=8,
        tie_word_embeddings=True, layer_norm_epsilon=1e-3,
    ),
    "recurrent_gemma": transformers.RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 4}, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, attention_window_size=8, lru_width=24,
    ),
    "qwen3_5_text": transformers.Qwen3_5TextConfig(
        **SIZES, **HEADS, head_dim=8, linear_key_head_dim=4, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, attention_bias=True,
        layer_types=["linear_attention", "full_attention"],
    ),
    "qwen3_next": transformers.Qwen3NextConfig(
        **SIZES, **HEADS, head_dim=8, linear_key_head_dim=4, linear_value_head_dim=4,
        linear_num_key_heads=2, linear_num_value_heads=4, num_experts=5, num_experts_per_tok=2,
        moe_intermediate_size=8, shared_expert_intermediate_size=10, mlp_only_layers=[0],
        layer_types=["full_attention", "linear_attention"],
    ),
    "lfm2": transformers.Lfm2Config(
        **SIZES, **HEADS, full_attn_idxs=[1], conv_bias=True, block_multiple_of=10,
    ),
    "bamba": transformers.BambaConfig(
        **SIZES, **HEADS, **MAMBA2, attn_layer_indices=[1], mlp_bias=True,
    ),
    "jamba": transformers.JambaConfig(
        **{**SIZES, "num_hidden_layers": 4}, **HEADS, attn_layer_period=3, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=3, num_experts_per_tok=2,
        mamba_d_state=4, mamba_dt_rank=3, mamba_proj_bias=True,
    ),
    "nemotron_h": transformers.NemotronHConfig(
        vocab_size=40, hidden_size=16, head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, mlp_bias=True, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=4,
        n_groups=2, chunk_size=8, use_bias=True, time_step_min=1e-5,
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
    ),
    "nemotron-experts": transformers.NemotronHConfig(
        vocab_size=40, hidden_size=16, head_dim=4, num_attention_heads=4, num_key_value_heads=1,
        ssm_state_size=8, mamba_num_heads=6, mamba_head_dim=4, n_groups=2, chunk_size=8,
        n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=2,
        moe_intermediate_size=8, moe_shared_expert_intermediate_size=12, moe_latent_size=8,
        routed_scaling_factor=1.5, time_step_min=1e-5,
        layers_block_type=["linear_attention", "moe", "full_attention"],
    ),
    "falcon_h1": transformers.FalconH1Config(
        **SIZES, **HEADS, mamba_d_ssm=24, mamba_n_heads=6, mamba_d_head=4, mamba_d_state=8,
        mamba_n_groups=2, mamba_chunk_size=8, attention_bias=True, mlp_bias=True,
        key_multiplier=0.4, attention_in_multiplier=1.5, attention_out_multiplier=0.8,
        ssm_in_multiplier=1.2, ssm_out_multiplier=0.7, ssm_multipliers=[0.5, 1.5, 0.8, 1.1, 0.9],
        mlp_multipliers=[0.9, 0.6], embedding_multiplier=3.0, lm_head_multiplier=0.25,
    ),
    "falcon-norm": transformers.FalconH1Config(
        **SIZES, **HEADS, mamba_d_ssm=None, mamba_n_heads=4, mamba_d_state=8, mamba_n_groups=2,
        mamba_chunk_size=8, mamba_rms_norm=True, mamba_norm_before_gate=True, mamba_proj_bias=True,
        projectors_bias=True, tie_word_embeddings=True,
    ),
    "granitemoehybrid": transformers.GraniteMoeHybridConfig(
        **SIZES, **HEADS, **MAMBA2, layer_types=["linear_attention", "full_attention"],
        num_local_experts=0, shared_intermediate_size=20, attention_multiplier=0.3,
        embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=5.0,
        tie_word_embeddings=True,
    ),
    "granite-experts": transformers.GraniteMoeHybridConfig(
        **SIZES, **HEADS, **MAMBA2, layer_types=["linear_attention", "full_attention"],
        num_local_experts=4, num_experts_per_tok=3, shared_intermediate_size=20,
        position_embedding_type="rope",
    ),
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 40, (2, 12))


def written_by_transformers(name, folder, noise=1.0):
    """A model that transformers has written into a folder; no parameter is at its start.

    The less noise, the less its layers amplify rounding.
    """
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if name.endswith("correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
        for name, parameter in theirs.named_parameters():
            parameter.add_((0.1 if "embed" in name else noise) * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


def logits_of(theirs):
    with torch.no_grad():
        return theirs(torch.tensor(IDS), attention_mask=torch.ones(IDS.shape)).logits.numpy()


def relative(actual, expected):
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


OURS = {
    "mamba": mamba_language_model(
        8, 2, MambaConfig(state_size=4, expand=3, conv_size=3), 40, tie_embeddings=False
    ),
    "falcon_mamba": mamba_language_model(
        8, 2, MambaConfig(state_size=4, dt_rank=2, mixer_rms_eps=1e-4), 40
    ),
    "mamba2": mamba_language_model(
        8, 2, Mamba2Config(state_size=4, head_size=4, groups=2, use_bias=True), 40
    ),
    "recurrent_gemma": griffin_language_model(
        ("sliding_window", "rg_lru") * 2,
        (
            RGLRUConfig(heads=2),
            SlidingWindowConfig(
                heads=2, kv_heads=1, rotary_base=100.0, rotary_fraction=1.0, window=5,
                use_bias=True, use_out_bias=True,
            ),
        ),
        8, 12, 40, logit_cap=5.0, tie_embeddings=False,
    ),
    "qwen3_5_text": hybrid_language_model(
        ("gated_deltanet", "attention") * 2,
        (
            GatedDeltaNetConfig(heads=2, head_size=4, norm_epsilon=1e-3),
            AttentionConfig(
                heads=2, kv_heads=1, rotary_fraction=0.5, qk_norm=True, zero_centered_norm=True,
                output_gate=True, norm_epsilon=1e-3,
            ),
        ),
        8, 12, 40, norm="zero_centered_rms", norm_epsilon=1e-3, tie_embeddings=True,
    ),
    "lfm2": hybrid_language_model(
        ("attention", "gated_conv"),
        (GatedConvConfig(conv_size=4, use_bias=True), AttentionConfig(heads=2, qk_norm=True)),
        8, 12, 40, norm_epsilon=1e-6, tie_embeddings=False,
    ),
    "bamba": hybrid_language_model(
        ("attention", "mamba2"),
        (
            Mamba2Config(state_size=4, head_size=4, groups=2),
            AttentionConfig(heads=2, rotary_fraction=0.5, use_bias=True),
        ),
        8, 12, 40, norm_epsilon=1e-5, tie_embeddings=True,
    ),
    "jamba": hybrid_language_model(
        ("attention", "mamba"),
        (
            MambaConfig(state_size=4, mixer_rms_eps=1e-5, mixer_rms_scales=True),
            AttentionConfig(heads=2, kv_heads=1, rotary_base=None),
        ),
        8, 12, 40, norm_epsilon=1e-5, tie_embeddings=True,
    ),
    "nemotron_h": single_branch_language_model(
        ("experts", "mamba2", "mlp", "attention"),
        (
            Mamba2Config(state_size=4, head_size=4, num_heads=2, time_step_limit=(0.01, np.inf)),
            AttentionConfig(heads=2, rotary_base=None),
        ),
        8, 40, norm_epsilon=1e-5, mlp=12,
        experts=ExpertsConfig(3, 2, 8, shared=4, scores="sigmoid", correction=True, scale=2.0),
    ),
    "falcon_h1": hybrid_language_model(
        ("parallel",) * 2,
        (
            ParallelConfig(
                (
                    Mamba2Config(state_size=4, head_size=4, num_heads=3, norm="before_gate"),
                    AttentionConfig(heads=2, kv_heads=1, score_scale=0.3),
                ),
                out_scales=(0.5, 2.0),
            ),
        ),
        8, 12, 40, norm_epsilon=1e-5, tie_embeddings=False, logit_scale=0.5,
        mlp_scales=(0.5, 2.0),
    ),
    "granitemoehybrid": hybrid_language_model(
        ("mamba2", "attention"),
        (Mamba2Config(state_size=4, head_size=8, use_bias=True), AttentionConfig(heads=2)),
        8, 12, 40, norm_epsilon=1e-5, tie_embeddings=False, residual_scale=0.5, logit_scale=0.25,
    ),
    "qwen3_next": hybrid_language_model(
        ("gated_deltanet", "attention"),
        (
            GatedDeltaNetConfig(heads=4, key_heads=2, head_size=4, expand_v=1.0, norm_epsilon=1e-6),
            AttentionConfig(heads=2, qk_norm=True, zero_centered_norm=True, output_gate=True),
        ),
        8, None, 40, norm="zero_centered_rms", norm_epsilon=1e-6, tie_embeddings=False,
        experts=ExpertsConfig(3, 2, 8, shared=5, shared_gate=True, normalised=False),
    ),
}  # fmt: skip


@functools.lru_cache
def random_params(model, seed=0):
    """Parameters all over the place, without running an initialisation."""
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(size=p.shape, scale=0.5).astype(np.float32), tree)


# The others are read by the same code.
KINDS = {"mamba", "mamba2", "recurrent_gemma", "qwen3_next", "granitemoehybrid"}


def families(names, kinds=frozenset(KINDS)):
    """Parameters of a test: those that are not of a kind of their own only among all tests."""
    full = pytest.mark.full
    return [name if name in kinds else pytest.param(name, marks=full) for name in names]
