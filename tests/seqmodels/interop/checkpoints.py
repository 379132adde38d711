"""Tiny checkpoints of every family, and how they are compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.mixers import Mamba2Config, MambaConfig, RGLRUConfig, SlidingWindowConfig
from seqmodels.models.published import griffin_language_model, mamba_language_model
from tests.pytorch import torch, transformers

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
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
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 40, (2, 12))


def written_by_transformers(name, folder):
    """A model that transformers has written into a folder; no parameter is at its start."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_((0.1 if "embed" in name else 1.0) * torch.randn_like(parameter))
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
}  # fmt: skip


@functools.lru_cache
def random_params(model, seed=0):
    """Parameters all over the place, without running an initialisation."""
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(size=p.shape, scale=0.5).astype(np.float32), tree)
