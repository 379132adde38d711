"""Checkpoints of Hugging Face's transformers, against transformers itself."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seqmodels.generation import Sampling, generate
from seqmodels.interop.huggingface import load, save
from seqmodels.mixers import S5Config
from seqmodels.models import LanguageModel, stack_layers
from tests import tolerances
from tests.pytorch import torch, transformers
from tests.seqmodels.interop.checkpoints import (
    CONFIGS,
    IDS,
    OURS,
    families,
    logits_of,
    random_params,
    relative,
    written_by_transformers,
)

# torch deprecates what its own modules call while transformers runs; nothing of ours is silenced.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


@pytest.fixture(scope="module", params=families(CONFIGS))
def published(request, tmp_path_factory):
    """A folder that transformers has written, and its model; no parameter is at its start."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, written_by_transformers(request.param, folder)


@pytest.mark.always("mamba", "qwen3_next", "granitemoehybrid")
def test_logits_and_greedy_tokens_are_those_of_transformers(published):
    folder, theirs = published
    model, params = load(folder)
    apply = jax.jit(lambda params, ids: model.apply({"params": params}, ids)[0])
    assert (
        relative(apply(params, jnp.asarray(IDS, jnp.int32)), logits_of(theirs))
        <= tolerances.FLOAT32_PUBLISHED
    )

    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        torch.tensor(IDS), attention_mask=torch.ones(IDS.shape), max_new_tokens=64, do_sample=False
    )[:, IDS.shape[1] :].tolist()
    assert all(len(set(row)) > 5 for row in expected)
    greedy = Sampling(temperature=0.0)
    found = generate(model, {"params": params}, IDS.tolist(), max_new_tokens=64, sampling=greedy)
    assert found == expected


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_round_trip_is_exact(published, tmp_path, stored):
    folder, theirs = published
    if stored == "bfloat16":
        shutil.copytree(folder, tmp_path / "stored")
        folder = tmp_path / "stored"
        file = folder / "model.safetensors"
        narrow = {k: v.astype(jnp.bfloat16) for k, v in load_file(file).items()}
        save_file(narrow, file, metadata={"format": "pt"})
    model, params = load(folder)
    assert model.config.dtype == stored
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    save(model, params, tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert set(before) == set(after)
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        np.testing.assert_array_equal(after[name].view(np.uint8), array.view(np.uint8), name)
    if stored == "float32":
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        np.testing.assert_allclose(
            logits_of(opened), logits_of(theirs), **tolerances.EACH_FLOAT32_LAYER
        )


def test_shards_are_the_same_checkpoint(published, tmp_path):
    folder, theirs = published
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    whole, params = load(folder)
    save(whole, params, tmp_path / "ours", max_file_bytes=8000)
    for sharded in (tmp_path / "theirs", tmp_path / "ours"):
        assert len(list(sharded.glob("*.safetensors"))) > 1
        model, loaded = load(sharded)
        assert model == whole
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(
        logits_of(opened), logits_of(theirs), **tolerances.EACH_FLOAT32_LAYER
    )


@pytest.mark.always("mamba", "qwen3_next")
@pytest.mark.parametrize("name", families(OURS))
def test_transformers_opens_a_model_of_ours(name, tmp_path):
    config = OURS[name]
    params = random_params(LanguageModel(config))
    save(LanguageModel(config), params, tmp_path / "unrolled")
    # A model of scanned layers is the same model.
    stack = dataclasses.replace(config.backbone, scan_layers=True)
    scanned = LanguageModel(dataclasses.replace(config, backbone=stack))
    params = {**params, "backbone": stack_layers(stack, params["backbone"])}
    save(scanned, params, tmp_path / "scanned")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("unrolled", "scanned"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[key], two[key]) for key in one)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "scanned", output_loading_info=True
    )
    assert theirs.config.model_type == name
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    ids = jnp.asarray(IDS, jnp.int32)
    ours = jax.jit(lambda p: scanned.apply({"params": p}, ids)[0])(params)
    assert relative(np.asarray(ours), logits_of(theirs)) <= tolerances.FLOAT32_PUBLISHED


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Model, parameters, and folders with them in one file and in several."""
    model = LanguageModel(OURS["mamba"])
    params = random_params(model)
    folder = tmp_path_factory.mktemp("small")
    save(model, params, folder / "whole")
    save(model, params, folder / "shards", max_file_bytes=4000)
    return model, params, folder


def edited(folder, to, change):
    """A copy of a folder after ``change`` of its tensors."""
    shutil.copytree(folder, to)
    arrays = load_file(to / "model.safetensors")
    change(arrays)
    save_file(arrays, to / "model.safetensors", metadata={"format": "pt"})
    return to


FIRST = "backbone.layers.0.mixer.A_log"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(FIRST), rf"{FIRST} \(24, 4\) is missing"),
        (lambda a: a.update({FIRST: np.zeros((4, 24), np.float32)}),
         rf"{FIRST} has shape \(4, 24\), expected \(24, 4\)"),
        (lambda a: a.update({FIRST: np.zeros((24, 4))}), f"{FIRST} has dtype F64"),
        (lambda a: a.update({"backbone.layers.2.norm.weight": np.zeros(8, np.float32)}),
         "backbone.layers.2.norm.weight is not expected"),
        (lambda a: (a.pop(FIRST), a.pop("lm_head.weight")), f"{FIRST} .* is missing"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_refused(small, tmp_path, change, message):
    folder = edited(small[2] / "whole", tmp_path / "bad", change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_copy_of_tied_embeddings_must_be_one(published, tmp_path):
    folder, theirs = published
    if not theirs.config.tie_word_embeddings:
        return
    name = next(name for name in load_file(folder / "model.safetensors") if "embed" in name)
    same = edited(folder, tmp_path / "same", lambda a: a.update({"lm_head.weight": a[name]}))
    jax.tree.map(np.testing.assert_array_equal, load(same)[1], load(folder)[1])
    other = edited(folder, tmp_path / "other", lambda a: a.update({"lm_head.weight": 2 * a[name]}))
    with pytest.raises(ValueError, match=f"lm_head.weight differs from {name}"):
        load(other)


def test_broken_files_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        load(tmp_path)
    shutil.copy(small[2] / "whole" / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load(tmp_path)
    whole = (small[2] / "whole" / "model.safetensors").read_bytes()
    for cut in (4, 100, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
            load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../whole/model.safetensors", "not the name of a safetensors file in the folder"),
        ("/etc/passwd", "not the name of a safetensors file in the folder"),
        ("pytorch_model.bin", "not the name of a safetensors file in the folder"),
        (7, "not the name of a safetensors file in the folder"),
        ("model-00009-of-00009.safetensors", r"model-00009-of-00009\.safetensors is missing"),
        (None, "lacks lm_head.weight"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(small, tmp_path, file, message):
    shutil.copytree(small[2] / "shards", tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    where = index["weight_map"]
    assert where[FIRST] != where["lm_head.weight"]
    where["lm_head.weight"] = file or where[FIRST]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad")


def test_a_tensor_that_the_index_does_not_say_is_refused(small, tmp_path):
    shutil.copytree(small[2] / "shards", tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][FIRST]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"has {FIRST}, which .* does not say"):
        load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mamba", {"model_type": "llama"}, "model_type='llama' is not known.*; one of mamba"),
        ("mamba", {"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'silu' is"),
        ("mamba", {"hidden_size": "8"}, "hidden_size='8' is not a int"),
        ("mamba", {"intermediate_size": 20}, "intermediate_size=20 must be a multiple"),
        ("mamba", {"state_size": 0}, r"config\.json: MambaConfig: state_size=0 must be positive"),
        ("mamba", {"rope_scaling": {"factor": 2}, "mlp": 3},
         r"rope_scaling={'factor': 2} is not supported; nor are mlp"),
        ("mamba2", {"num_heads": 3}, r"num_heads \* head_dim = 12 must be expand"),
        ("mamba2", {"time_step_limit": [1.0]}, r"time_step_limit=\[1.0\] is not a pair"),
        ("recurrent_gemma", {"block_types": ["mamba"]}, "block_types=.* may hold only recurrent"),
        ("recurrent_gemma", {"intermediate_size": 25}, "intermediate_size=25 must be even"),
        ("recurrent_gemma", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not"),
        ("recurrent_gemma", {"vocab_size": None}, "vocab_size=None is not a int"),
        ("qwen3_5_text", {"layer_types": ["mamba"] * 4}, "may hold only linear_attention, full"),
        ("qwen3_5_text", {"layer_types": ["full_attention"]}, "has 1 entries, .*_hidden_layers=4"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate=False is not supported"),
        ("qwen3_5_text", {"num_experts": 8}, "num_experts=8 is not supported"),
        ("qwen3_next", {"num_experts": 1}, "ExpertsConfig: chosen=2 must be at most experts=1"),
        ("granitemoehybrid", {"mamba_d_head": 3}, r"mamba_n_heads \* mamba_d_head = 6 must be"),
        ("lfm2", {"layer_types": [7, 7]}, "may hold only conv, full_attention, not 7"),
    ],
)  # fmt: skip
def test_unsupported_fields_are_named(tmp_path, name, fields, message):
    model = LanguageModel(OURS[name])
    save(model, random_params(model), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_older_names_of_fields(tmp_path):
    model = LanguageModel(OURS["recurrent_gemma"])
    save(model, random_params(model), tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    old = {"rope_theta": 100.0, "partial_rotary_factor": 1.0, "embeddings_scale_by_sqrt_dim": True}
    path.write_text(json.dumps({k: v for k, v in fields.items() if "rope" not in k} | old))
    attention = load(tmp_path)[0].config.backbone.mixer(0)
    assert (attention.rotary_base, attention.rotary_fraction) == (100.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_cap": 3.0}, "as a mamba model: cannot say LanguageModelConfig.logit_cap=3.0"),
        ({"norm": "layer"}, "cannot say BackboneConfig.norm='layer' .only 'rms'"),
        ({"mlp": 4}, "as a jamba model: cannot say BackboneConfig.float32_residual=True"),
        ({"layout": ("s5",), "mixers": (S5Config(state_size=4, blocks=1),)},
         "a layout of s5 is that of no family"),
    ],
)  # fmt: skip
def test_models_of_no_family_are_refused(small, tmp_path, change, message):
    config = small[0].config
    if set(change) <= {"logit_cap"}:
        config = dataclasses.replace(config, **change)
    else:
        stack = dataclasses.replace(config.backbone, **change)
        config = dataclasses.replace(config, backbone=stack)
    with pytest.raises(ValueError, match=message):
        save(LanguageModel(config), small[1], tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_parameters_and_full_folders_are_refused(small, tmp_path):
    model, params, folder = small
    with pytest.raises(ValueError, match=r"has a model\.safetensors already"):
        save(model, params, folder / "whole")
    with pytest.raises(ValueError, match=r"params: head/kernel is missing"):
        save(model, {k: v for k, v in params.items() if k != "head"}, tmp_path)
    with pytest.raises(ValueError, match=r"params: extra is not a parameter"):
        save(model, {**params, "extra": np.zeros(3)}, tmp_path)
    wrong = {**params, "head": {"kernel": params["head"]["kernel"].T}}
    with pytest.raises(ValueError, match=r"head/kernel gives lm_head.weight the shape \(8, 40\)"):
        save(model, wrong, tmp_path)


def test_activations_and_storage_can_be_chosen(small, tmp_path):
    _, params, folder = small
    narrow, _ = load(folder / "whole", dtype="bfloat16")
    assert narrow.config.dtype == "bfloat16"
    assert load(folder / "whole")[0].config.dtype == "float32"
    save(narrow, params, tmp_path, dtype="float32")
    assert {array.dtype.name for array in load_file(tmp_path / "model.safetensors").values()} == {
        "float32"
    }
