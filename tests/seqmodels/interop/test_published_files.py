"""Folders as they are published: older fields, base models, pickles, mamba_ssm's own format."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seqmodels.interop.fields import WITHOUT_EFFECT, parsed
from seqmodels.interop.huggingface import load, save
from seqmodels.models import LanguageModel
from tests import tolerances
from tests.pytorch import torch, transformers
from tests.seqmodels.interop.checkpoints import (
    CONFIGS,
    IDS,
    families,
    logits_of,
    relative,
    written_by_transformers,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

# Odd values for every field that is declared to change no logit.
ODD = {
    "_commit_hash": "0123", "_name_or_path": "/x", "architectures": ["Other"],
    "auto_map": {"AutoModel": "ours.Ours"}, "custom_pipelines": {"p": {}}, "name_or_path": "/x",
    "processor_class": "P", "tokenizer_class": "LlamaTokenizer", "transformers_version": "4.44.0",
    "unsloth_fixed": True, "unsloth_version": "2025.1", "bad_words_ids": [[3]],
    "begin_suppress_tokens": [6], "bos_token_id": 3, "decoder_start_token_id": 3,
    "diversity_penalty": 0.5, "do_sample": True, "early_stopping": True,
    "encoder_no_repeat_ngram_size": 2, "eos_token_id": 4,
    "exponential_decay_length_penalty": [2, 1.5], "forced_bos_token_id": 3,
    "forced_eos_token_id": 4, "is_decoder": True, "length_penalty": 2.0, "max_length": 9,
    "max_position_embeddings": 9, "max_sequence_length": 9, "min_length": 2,
    "model_max_length": 9, "no_repeat_ngram_size": 2, "num_beam_groups": 2, "num_beams": 4,
    "num_return_sequences": 2, "pad_token_id": 5, "prefix": "a", "remove_invalid_values": True,
    "repetition_penalty": 2.0, "sep_token_id": 5, "suppress_tokens": [6],
    "task_specific_params": {"a": 1}, "temperature": 0.5, "top_k": 3, "top_p": 0.5,
    "typical_p": 0.5, "unk_token_id": 3, "output_attentions": False,
    "output_hidden_states": True, "output_scores": True, "return_dict": True,
    "return_dict_in_generate": True, "torchscript": False, "use_cache": False,
    "_attn_implementation_autoset": True, "_flash_attn_2_enabled": True,
    "chunk_size_feed_forward": 3, "gradient_checkpointing": True, "initializer_range": 0.7,
    "finetuning_task": "t", "id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 3,
    "problem_type": "regression",
}  # fmt: skip
_BOTH = {
    "rescale_prenorm_residual": True, "time_step_floor": 0.5, "time_step_init_scheme": "constant",
    "time_step_scale": 3.0, "use_associative_scan": False, "use_mambapy": True, "d_model": 5,
    "d_inner": 5, "n_layer": 5, "ssm_cfg": {"a": 1}, "fused_add_norm": True, "rms_norm": False,
    "pad_vocab_size_multiple": 8, "time_step_min": 0.5, "time_step_max": 0.7,
}  # fmt: skip
_GRANITE = {
    "mamba_chunk_size": 4, "router_aux_loss_coef": 0.5, "init_method": "mup",
    "attention_dropout": 0.5,
}  # fmt: skip
_FALCON = {
    "num_logits_to_keep": 3, "mamba_chunk_size": 4, "mamba_use_mlp": False,
    "mlp_expansion_factor": 3, "attn_layer_indices": [1], "attention_dropout": 0.5,
}  # fmt: skip
_NEMOTRON = {
    "num_nextn_predict_layers": 2, "mtp_layers_block_type": ["mlp"],
    "mtp_hybrid_override_pattern": "*E", "num_logits_to_keep": 3,
    "rescale_prenorm_residual": False, "use_mamba_kernels": False, "mamba_chunk_size": 4,
    "mamba_ssm_cache_dtype": "bfloat16", "moe_shared_expert_overlap": False,
    "mamba_dt_init_floor": 0.5, "hidden_dropout": 0.5, "mamba_expand": 5, "mamba_proj_bias": True,
    "time_step_rank": 7, "mamba_dt_limit": [0.1, 0.2], "num_query_groups": 3, "rms_norm_eps": 0.5,
    "residual_in_fp32": True, "n_shared_experts": 3, "time_step_max": 0.7, "num_hidden_layers": 9,
    "attention_dropout": 0.5,
}  # fmt: skip
ODD_OF = {
    "mamba": _BOTH,
    "falcon_mamba": _BOTH | {"use_falcon_mambapy": True},
    "mamba2": _BOTH | {
        "norm_before_gate": True, "rmsnorm": False, "chunk_size": 4, "intermediate_size": 5,
        "time_step_rank": 7,
    },
    "recurrent_gemma": {
        "embeddings_scale_by_sqrt_dim": False, "_block_types": ["attention"],
        "w_init_variance_scale": 0.5, "final_w_init_variance_scale": 0.5, "attention_dropout": 0.5,
        "hidden_activation": "gelu_new",
    },
    "qwen3_5_text": {
        "attention_dropout": 0.5, "mtp_num_hidden_layers": 3, "mtp_use_dedicated_embeddings": True,
        "mamba_ssm_dtype": "bfloat16", "full_attention_interval": 3,
    },
    "qwen3_next": {
        "attention_dropout": 0.5, "router_aux_loss_coef": 0.5, "full_attention_interval": 3,
    },
    "lfm2": {
        "block_dim": 5, "block_norm_eps": 0.5, "conv_dim": 5, "conv_dim_out": 5, "num_heads": 5,
        "block_use_swiglu": False, "use_pos_enc": False, "block_mlp_init_scale": 0.5,
        "block_out_init_scale": 0.5, "block_use_xavier_init": True, "conv_use_xavier_init": True,
        "full_attn_idxs": [0],
    },
    "bamba": {
        "mamba_chunk_size": 4, "num_logits_to_keep": 3, "z_loss_coefficient": 0.5,
        "attn_rotary_emb": 2, "attention_dropout": 0.5,
    },
    "granitemoehybrid": _GRANITE | {"intermediate_size": 5, "num_experts_per_tok": 3},
    "granite-experts": _GRANITE,
    "jamba": {
        "num_logits_to_keep": 3, "calc_logits_for_entire_prompt": True,
        "router_aux_loss_coef": 0.5, "use_mamba_kernels": False, "use_mambapy": True,
        "use_associative_scan": False, "attention_dropout": 0.5,
    },
    "nemotron_h": _NEMOTRON | {
        "n_routed_experts": 3, "num_experts_per_tok": 1, "moe_latent_size": 5, "n_group": 3,
        "moe_intermediate_size": 5, "moe_shared_expert_intermediate_size": 5, "topk_group": 3,
        "norm_topk_prob": False, "routed_scaling_factor": 3.0,
    },
    "nemotron-experts": _NEMOTRON | {"intermediate_size": 5},
    "falcon_h1": _FALCON | {"mamba_norm_before_gate": False},
    "falcon-norm": _FALCON,
}  # fmt: skip


@pytest.fixture(scope="module", params=families(CONFIGS))
def published(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, written_by_transformers(request.param, folder)


def copied(folder, to, config=None, tensors=None):
    """A copy of a folder with other fields, and tensors under other names or not at all."""
    to.mkdir()
    fields = parsed((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(fields | config if config else fields))
    arrays = load_file(folder / "model.safetensors")
    if tensors:
        arrays = {tensors(name): a for name, a in arrays.items() if tensors(name)}
    save_file(arrays, to / "model.safetensors", metadata={"format": "pt"})
    return to


def our_logits(folder):
    model, params = load(folder)
    apply = jax.jit(lambda params, ids: model.apply({"params": params}, ids)[0])
    return np.asarray(apply(params, jnp.asarray(IDS, jnp.int32)))


def test_fields_without_effect_have_none_in_transformers(published, tmp_path):
    name, folder, theirs = published
    common = {field for fields in WITHOUT_EFFECT.values() for field in fields}
    names_only = {"model_type", "dtype", "torch_dtype", "use_return_dict"}
    implementations = {"_attn_implementation", "attn_implementation"}
    assert set(ODD) == common - names_only - implementations
    odd = copied(folder, tmp_path / "odd", config=ODD | ODD_OF[name])
    # Not `from_pretrained`: that of transformers 5 scales a checkpoint's out_proj for the field
    # rescale_prenorm_residual, as if it were an initial value.
    config = transformers.AutoConfig.from_pretrained(odd)
    opened = transformers.AutoModelForCausalLM.from_config(config).eval()
    opened.load_state_dict(theirs.state_dict())
    np.testing.assert_allclose(
        logits_of(opened), logits_of(theirs), **tolerances.EACH_FLOAT32_LAYERS
    )
    (model, params), (plain, same) = load(odd), load(folder)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert without_steps(model.config) == without_steps(plain.config)
    save(model, params, tmp_path / "again")
    again = parsed((tmp_path / "again" / "config.json").read_text())
    assert again == parsed((odd / "config.json").read_text())


def without_steps(config):
    """The text of a config without the range of initial step sizes."""
    return re.sub(r"dt_(min|max)=[0-9.]+", "", repr(config))


# Fields that published checkpoints have beside their sizes.
PUBLISHED = {
    "mamba": """{"_name_or_path": "/temp/mamba-130m-hf", "architectures": ["MambaForCausalLM"],
        "bos_token_id": 0, "d_inner": 32, "d_model": 16, "eos_token_id": 0, "fused_add_norm": true,
        "hidden_act": "silu", "initializer_range": 0.1, "n_layer": 2, "pad_token_id": 0,
        "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": false, "residual_in_fp32": true,
        "rms_norm": true, "ssm_cfg": {}, "time_step_floor": 0.0001,
        "time_step_init_scheme": "random", "time_step_scale": 1.0, "torch_dtype": "float32",
        "transformers_version": "4.39.0.dev0", "use_cache": true}""",
    "falcon_mamba": """{"architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0,
        "eos_token_id": 11, "hidden_act": "silu", "initializer_range": 0.1, "pad_token_id": 11,
        "rescale_prenorm_residual": false, "residual_in_fp32": true, "time_step_floor": 0.0001,
        "time_step_init_scheme": "random", "time_step_scale": 1.0, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": true, "use_mambapy": false}""",
    "mamba2": """{"_name_or_path": "Mamba-Codestral-7B-v0.1", "architectures":
        ["Mamba2ForCausalLM"], "bos_token_id": 0, "chunk_size": 256, "eos_token_id": 0,
        "hidden_act": "silu", "initializer_range": 0.1, "intermediate_size": 32,
        "norm_before_gate": true, "pad_token_id": 0, "rescale_prenorm_residual": false,
        "residual_in_fp32": true, "rms_norm": true, "time_step_floor": 0.0001,
        "time_step_init_scheme": "random", "time_step_limit": [0.0, Infinity],
        "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256,
        "time_step_scale": 1.0, "torch_dtype": "bfloat16", "transformers_version": "4.44.0.dev0",
        "use_cache": true}""",
    "recurrent_gemma": """{"_block_types": ["recurrent", "recurrent", "attention", "recurrent"],
        "architectures": ["RecurrentGemmaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 2, "embeddings_scale_by_sqrt_dim": true,
        "eos_token_id": 1, "final_w_init_variance_scale": 0.5, "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh", "logits_soft_cap": 30.0, "pad_token_id": 0,
        "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "torch_dtype": "float32",
        "transformers_version": "4.42.0.dev0", "use_cache": true, "w_init_variance_scale": 0.01}""",
    "qwen3_5_text": """{"architectures": ["Qwen3_5ForCausalLM"], "attention_dropout": 0.0,
        "attn_output_gate": true, "dtype": "bfloat16", "eos_token_id": 248044,
        "full_attention_interval": 4, "hidden_act": "silu", "initializer_range": 0.02,
        "mamba_ssm_dtype": "float32", "mlp_only_layers": [], "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": false, "rms_norm_eps": 1e-06, "use_cache": true}""",
    "qwen3_next": """{"architectures": ["Qwen3NextForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
        "full_attention_interval": 4, "hidden_act": "silu", "initializer_range": 0.02,
        "norm_topk_prob": true, "output_router_logits": false, "partial_rotary_factor": 0.25,
        "rope_scaling": null, "rope_theta": 10000, "router_aux_loss_coef": 0.001,
        "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0", "use_cache": true}""",
    "lfm2": """{"architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": true,
        "block_dim": 16, "block_ff_dim": 24, "block_ffn_dim_multiplier": 1.0,
        "block_mlp_init_scale": 1.0, "block_multiple_of": 10, "block_norm_eps": 1e-05,
        "block_out_init_scale": 1.0, "block_use_swiglu": true, "block_use_xavier_init": true,
        "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": true, "conv_dim": 16,
        "conv_dim_out": 16, "conv_use_xavier_init": true, "eos_token_id": 7,
        "full_attn_idxs": [1], "num_heads": 4, "pad_token_id": 0, "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": true,
        "use_pos_enc": true}""",
    "bamba": """{"architectures": ["BambaForCausalLM"], "attention_dropout": 0.0,
        "attn_rotary_emb": 2, "bos_token_id": 128000, "eos_token_id": 128001,
        "hidden_act": "silu", "mamba_chunk_size": 256, "num_logits_to_keep": 1,
        "rope_scaling": null, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0.dev0", "use_cache": true}""",
    "granitemoehybrid": """{"architectures": ["GraniteMoeHybridForCausalLM"],
        "attention_dropout": 0.0, "init_method": "mup", "initializer_range": 0.1,
        "layer_types": ["mamba", "attention"], "mamba_chunk_size": 256,
        "normalization_function": "rmsnorm", "output_router_logits": false,
        "position_embedding_type": "nope", "rope_scaling": null, "rope_theta": 10000,
        "router_aux_loss_coef": 0.01, "torch_dtype": "bfloat16", "use_cache": true}""",
    "granite-experts": """{"architectures": ["GraniteMoeHybridForCausalLM"],
        "attention_dropout": 0.0, "init_method": "mup", "initializer_range": 0.1,
        "layer_types": ["mamba", "attention"], "mamba_chunk_size": 256,
        "normalization_function": "rmsnorm", "output_router_logits": false,
        "rope_scaling": null, "rope_theta": 10000, "router_aux_loss_coef": 0.01,
        "torch_dtype": "bfloat16", "use_cache": true}""",
    "jamba": """{"architectures": ["JambaForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 1, "calc_logits_for_entire_prompt": false, "eos_token_id": 2,
        "hidden_act": "silu", "initializer_range": 0.02, "mamba_inner_layernorms": true,
        "num_logits_to_keep": 1, "output_router_logits": false, "pad_token_id": 0,
        "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "sliding_window": null,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "use_cache": true,
        "use_mamba_kernels": true}""",
    "nemotron_h": """{"architectures": ["NemotronHForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 1, "chunk_size": 128, "conv_kernel": 4,
        "eos_token_id": 2, "expand": 2, "hidden_dropout": 0.0,
        "hybrid_override_pattern": "M-*-M", "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "layers_block_type": null, "mamba_hidden_act": "silu",
        "mamba_proj_bias": false, "mlp_hidden_act": "relu2", "num_hidden_layers": 5,
        "num_logits_to_keep": 1, "num_query_groups": 2, "pad_token_id": 0,
        "rescale_prenorm_residual": true, "residual_in_fp32": false, "rms_norm_eps": 1e-05,
        "sliding_window": null, "tie_word_embeddings": false, "time_step_floor": 0.0001,
        "time_step_limit": [0.0, Infinity], "time_step_max": 0.1, "time_step_min": 0.00001,
        "time_step_rank": 256, "torch_dtype": "bfloat16", "transformers_version": "4.48.0.dev0",
        "use_cache": true, "use_conv_bias": true, "use_mamba_kernels": true}""",
    "falcon_h1": """{"architectures": ["FalconH1ForCausalLM"], "attention_dropout": 0.0,
        "attn_layer_indices": null, "bos_token_id": 1, "eos_token_id": 11, "hidden_act": "silu",
        "initializer_range": 0.02, "mamba_chunk_size": 128, "mamba_norm_before_gate": false,
        "mamba_use_mlp": true, "mlp_expansion_factor": 8, "num_logits_to_keep": 1,
        "pad_token_id": 0, "projectors_bias": false, "rope_scaling": null, "rope_theta": 10000.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.52.0.dev0", "use_cache": true}""",
    "falcon-norm": """{"architectures": ["FalconH1ForCausalLM"], "hidden_act": "silu",
        "mamba_d_head": 8, "mamba_expand": 2, "rope_scaling": null, "rope_theta": 10000.0}""",
    "nemotron-experts": """{"architectures": ["NemotronHForCausalLM"], "attention_bias": false,
        "hybrid_override_pattern": "ME*", "layers_block_type": null, "mamba_hidden_act": "silu",
        "mamba_ssm_cache_dtype": "float32", "mlp_hidden_act": "relu2",
        "moe_shared_expert_overlap": true, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_hidden_layers": 3, "rescale_prenorm_residual": true, "residual_in_fp32": false,
        "sliding_window": null, "torch_dtype": "bfloat16", "use_cache": true}""",
}


def test_published_fields_are_read_and_kept(published, tmp_path):
    name, folder, _ = published
    fields = json.loads(PUBLISHED[name])
    older = copied(folder, tmp_path / "older", config=fields)
    model, params = load(older)
    assert model == load(folder)[0]
    save(model, params, tmp_path / "again")
    again = parsed((tmp_path / "again" / "config.json").read_text())
    assert again.items() >= fields.items()
    assert again == parsed((older / "config.json").read_text())


@pytest.mark.full
def test_heads_of_any_size(tmp_path):
    config = CONFIGS["recurrent_gemma"].to_dict() | {"head_dim": 12}
    torch.manual_seed(0)
    theirs = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**config))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    assert (
        relative(our_logits(tmp_path / "theirs"), logits_of(theirs)) <= tolerances.FLOAT32_PUBLISHED
    )
    model, params = load(tmp_path / "theirs")
    save(LanguageModel(model.config), params, tmp_path / "ours")
    assert load(tmp_path / "ours")[0] == model


@pytest.mark.parametrize("prefix", [True, False])
def test_base_models(published, tmp_path, prefix):
    name, folder, theirs = published
    tied = theirs.config.tie_word_embeddings

    def headless(tensor):
        if tensor == "lm_head.weight":
            return None
        return tensor if prefix else tensor.partition(".")[2].replace("embeddings.", "embedding.")

    base = copied(folder, tmp_path / "base", tensors=headless)
    if not tied:
        with pytest.raises(ValueError, match=r"lm_head.weight \(40, 16\) is missing, as in a base"):
            load(base)
    model, params = load(base, require_head=False)
    expected = {key: value for key, value in load(folder)[1].items() if key != "head"}
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    save(model, params, tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).exists()
    one, two = (load_file(f / "model.safetensors") for f in (base, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[key], two[key]) for key in one)
    if name == "falcon_mamba" and not prefix:
        ids = jnp.asarray(IDS, jnp.int32)
        apply = jax.jit(lambda p: model.apply({"params": p}, ids, method="hidden")[0])
        with torch.no_grad():
            hidden = theirs.base_model(torch.tensor(IDS)).last_hidden_state.numpy()
        assert relative(np.asarray(apply(params)), hidden) <= tolerances.FLOAT32_PUBLISHED


def native(folder, to, fields):
    """A folder as mamba_ssm has it, of one that transformers wrote, but for the pickle."""
    rename = lambda name: name.replace("embeddings.", "embedding.")  # noqa: E731
    copied(folder, to, tensors=rename)
    (to / "config.json").write_text(json.dumps(fields))
    return to


NATIVE = {
    "mamba": {
        "d_model": 16, "n_layer": 2, "vocab_size": 37, "rms_norm": True, "residual_in_fp32": True,
        "ssm_cfg": {"d_state": 4, "bias": True, "dt_rank": 3, "dt_init": "random"},
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    },
    "mamba2": {
        "d_model": 16, "d_intermediate": 0, "n_layer": 2, "vocab_size": 40, "attn_layer_idx": [],
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2, "chunk_size": 8},
        "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    },
}  # fmt: skip


def test_folders_of_mamba_ssm(published, tmp_path):
    name, folder, theirs = published
    if name not in NATIVE:
        return
    if name == "mamba2":
        # mamba_ssm has this epsilon for every norm.
        theirs.config.layer_norm_epsilon = 1e-5
        theirs = transformers.Mamba2ForCausalLM(theirs.config).eval()
        theirs.load_state_dict(
            {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()},
            strict=False,
        )
    own = native(folder, tmp_path / "own", NATIVE[name])
    assert relative(our_logits(own), logits_of(theirs)) <= tolerances.FLOAT32_PUBLISHED
    model, params = load(own)
    save(model, params, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == NATIVE[name]
    one, two = (load_file(f / "model.safetensors") for f in (own, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert "backbone.embedding.weight" in one
    # A model that forgot its origin is written for transformers.
    save(LanguageModel(model.config), params, tmp_path / "converted")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    np.testing.assert_allclose(
        logits_of(opened), logits_of(theirs), **tolerances.EACH_FLOAT32_LAYER
    )
    # A changed one changes what it must.
    stack = dataclasses.replace(model.config.backbone, layout=(name,))
    shorter = model.clone(config=dataclasses.replace(model.config, backbone=stack))
    cut = {**params, "backbone": {k: v for k, v in params["backbone"].items() if k != "block_1"}}
    save(shorter, cut, tmp_path / "shorter")
    again = json.loads((tmp_path / "shorter" / "config.json").read_text())
    assert again == NATIVE[name] | {"n_layer": 1}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mamba", {"rms_norm": False}, r"rms_norm=False is not supported, only True is"),
        ("mamba", {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple=0 must be positive"),
        ("mamba", {"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer='Mamba3' is not known; one of"),
        ("mamba", {"ssm_cfg": {"gate": 2}}, "config.json: ssm_cfg: gate=2 is not supported"),
        ("mamba", {"moe": 3}, "moe=3 is not supported; remove from the file what changes no logit"),
        ("mamba2", {"attn_layer_idx": [1]}, r"attn_layer_idx=\[1\] is not supported"),
        ("mamba2", {"d_intermediate": 8}, "d_intermediate=8 is not supported, only 0 is"),
        ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
        ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim=True is not"),
        ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 8}}, "d_ssm=8 is not supported"),
    ],
)
def test_fields_of_mamba_ssm_that_are_refused(tmp_path, name, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(NATIVE[name] | fields))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("parts", [1, 2])
def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path, monkeypatch, parts):
    folder = tmp_path / "a folder"
    theirs = written_by_transformers("mamba", folder)
    (folder / "model.safetensors").unlink()
    state = theirs.half().state_dict()
    assert state["lm_head.weight"].data_ptr() == state["backbone.embeddings.weight"].data_ptr()
    for part in range(parts):
        file = f"pytorch_model-0000{part}-of-2.bin" if parts > 1 else "pytorch_model.bin"
        torch.save(dict(list(state.items())[part::parts]), folder / file)
    (folder / "training_args.bin").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="only pickled tensors, which are never read") as error:
        load(folder)
    command = re.fullmatch(r".*: cd '(.*)' && python -c \"(.*)\"", str(error.value))
    monkeypatch.chdir(command.group(1))
    exec(command.group(2), {})
    model, params = load(folder)
    save(model, params, tmp_path / "again")
    for name, array in load_file(tmp_path / "again" / "model.safetensors").items():
        np.testing.assert_array_equal(array, state[name].numpy(), name)


def test_ways_out_are_named(tmp_path):
    written_by_transformers("mamba", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"only consolidated\.safetensors; rename one that holds"):
        load(tmp_path)
    fields = parsed((tmp_path / "config.json").read_text())
    quantized = fields | {"odd": 1, "quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ValueError, match=r"quantization_config is not supported: .*dequantize"):
        load(tmp_path)
