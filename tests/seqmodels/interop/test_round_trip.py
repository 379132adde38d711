"""What `save` writes of a model that `load` read: everything as it was."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seqmodels.interop.fields import json_text, parsed
from seqmodels.interop.huggingface import load, save
from seqmodels.models import LanguageModel
from tests.pytorch import transformers
from tests.seqmodels.interop.checkpoints import (
    CONFIGS,
    OURS,
    families,
    random_params,
    written_by_transformers,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

DTYPES = (jnp.float32, jnp.bfloat16, np.float16)
FLOAT32 = ("A_log", ".D", "dt_proj.bias", "dt_bias", "recurrent_param")
GENERATION = {
    "_from_model_config": True, "bos_token_id": 7, "eos_token_id": [5, 6], "pad_token_id": 6,
    "suppress_tokens": [1], "temperature": 0.5, "transformers_version": "4.44.0",
}  # fmt: skip
EXTRA = {
    "auto_map": {"AutoModelForCausalLM": "modeling_ours.Ours"}, "tokenizer_class": "LlamaTokenizer",
    "bos_token_id": 7, "eos_token_id": 5, "pad_token_id": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0", "use_cache": False, "unknown_but_off": False,
}  # fmt: skip


def strict_json(path):
    """The object in a file; fails for what RFC 8259 does not know."""

    def refuse(constant):
        raise AssertionError(f"{path}: {constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    return parsed(path.read_text())


def assert_same_tensors(one, two):
    before, after = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert set(before) == set(after)
    for name, array in before.items():
        assert (after[name].dtype, after[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(after[name].view(np.uint8), array.view(np.uint8), name)


def assert_same_folders(one, two):
    assert_same_tensors(one, two)
    for file in ("config.json", "generation_config.json"):
        assert (one / file).exists() == (two / file).exists()
        if (one / file).exists():
            before, after = parsed((one / file).read_text()), strict_json(two / file)
            assert list(before.items()) == list(after.items())


@pytest.fixture(scope="module", params=families(CONFIGS))
def mixed(request, tmp_path_factory):
    """A folder as people have them: three dtypes, denormal numbers, fields of older versions."""
    folder = tmp_path_factory.mktemp(request.param)
    written_by_transformers(request.param, folder)
    arrays = load_file(folder / "model.safetensors")
    for number, (name, array) in enumerate(arrays.items()):
        array.flat[0] = (1e-40, 1e-40, 1e-7)[number % 3]
        wide = name.endswith(FLOAT32)
        arrays[name] = array.astype(np.float32 if wide else DTYPES[number % 3])
    assert {array.dtype for array in arrays.values()} == {np.dtype(dtype) for dtype in DTYPES}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    config = parsed((folder / "config.json").read_text()) | EXTRA
    if "hidden_act" in config:
        config["hidden_act"] = "swish"
    # A bare Infinity, as older versions wrote it.
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def test_a_round_trip_changes_nothing(mixed, tmp_path):
    model, params = load(mixed)
    save(model, params, tmp_path / "once")
    assert_same_folders(mixed, tmp_path / "once")
    save(*load(tmp_path / "once"), tmp_path / "twice", max_file_bytes=8000)
    assert (tmp_path / "twice" / "generation_config.json").exists()
    again, same = load(tmp_path / "twice")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_model_made_anew_is_written_after_a_folder(mixed, tmp_path):
    model, params = load(mixed)
    save(LanguageModel(model.config), params, tmp_path / "like", like=mixed)
    assert_same_folders(mixed, tmp_path / "like")


def test_tuned_parameters_are_written_in_the_dtype_of_each(mixed, tmp_path):
    model, params = load(mixed)
    tuned = jax.tree.map(lambda p: np.float32(1.37) * np.asarray(p) + np.float32(0.01), params)
    save(model, tuned, tmp_path / "tuned")
    dtypes = {name: a.dtype for name, a in load_file(mixed / "model.safetensors").items()}
    written = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {name: array.dtype for name, array in written.items()} == dtypes
    # The same numbers through a model that stores all in float32, rounded here.
    save(LanguageModel(model.config), tuned, tmp_path / "wide")
    for name, array in load_file(tmp_path / "wide" / "model.safetensors").items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array.astype(dtypes[name]), written[name], name)


def test_a_changed_model_changes_only_its_own_fields(mixed, tmp_path):
    model, params = load(mixed)
    config = dataclasses.replace(model.config, vocabulary_size=48)
    grown = {**params, "embedding": {"embedding": np.ones((48, 16), np.float32)}}
    if "head" in params:
        grown["head"] = {"kernel": np.ones((16, 48), np.float32)}
    save(model.clone(config=config), grown, tmp_path / "grown")
    before = parsed((mixed / "config.json").read_text())
    assert strict_json(tmp_path / "grown" / "config.json") == before | {"vocab_size": 48}
    assert load(tmp_path / "grown")[0].config == config


def test_one_dtype_for_all_can_be_asked_for(mixed, tmp_path):
    model, params = load(mixed)
    save(model, params, tmp_path / "narrow", dtype="float16")
    arrays = load_file(tmp_path / "narrow" / "model.safetensors")
    assert {array.dtype.name for array in arrays.values()} == {"float16"}
    config = strict_json(tmp_path / "narrow" / "config.json")
    assert config["torch_dtype"] == "float16"
    assert config["eos_token_id"] == 5
    assert strict_json(tmp_path / "narrow" / "generation_config.json") == GENERATION


def test_a_copy_of_the_embeddings_stays_one(mixed, tmp_path):
    model, params = load(mixed)
    if not model.config.tie_embeddings:
        return
    arrays = load_file(mixed / "model.safetensors")
    table = next(name for name in arrays if "embed" in name)
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in ("config.json", "generation_config.json"):
        (copied / file).write_bytes((mixed / file).read_bytes())
    arrays["lm_head.weight"] = arrays[table].astype(np.float32)
    save_file(arrays, copied / "model.safetensors", metadata={"format": "pt"})
    model, params = load(copied)
    save(model, params, tmp_path / "again")
    assert_same_folders(copied, tmp_path / "again")
    tuned = {**params, "embedding": {"embedding": params["embedding"]["embedding"] + 1}}
    save(model, tuned, tmp_path / "tuned")
    after = load_file(tmp_path / "tuned" / "model.safetensors")
    expected = np.asarray(tuned["embedding"]["embedding"])
    np.testing.assert_array_equal(after["lm_head.weight"], expected)
    np.testing.assert_array_equal(after[table], expected.astype(arrays[table].dtype))


@pytest.mark.parametrize("name", families(OURS))
def test_a_new_model_is_written_as_its_parameters_are(name, tmp_path):
    model = LanguageModel(dataclasses.replace(OURS[name], dtype="bfloat16"))

    def stored(path, p):
        leaf = jax.tree_util.keystr(path)
        return p if leaf.endswith(("bias']", "A_log']", "D']")) else p.astype(jnp.bfloat16)

    params = jax.tree_util.tree_map_with_path(stored, random_params(LanguageModel(OURS[name])))
    save(model, params, tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16", "float32"}
    again, loaded = load(tmp_path)
    assert again.config.dtype == "bfloat16"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), b), params, loaded)
    strict_json(tmp_path / "config.json")
    assert not (tmp_path / "generation_config.json").exists()


def test_infinities_are_written_as_transformers_does():
    values = {"limits": (0.0, float("inf")), "inner": {"least": [float("-inf")]}, "layers": 2}
    text = json_text(values)
    assert json.loads(text) == {
        "limits": [0.0, {"__float__": "Infinity"}],
        "inner": {"least": [{"__float__": "-Infinity"}]},
        "layers": 2,
    }
    assert parsed(text) == {**values, "limits": [0.0, float("inf")]}
    assert parsed('{"a": Infinity, "b": -Infinity}') == {"a": float("inf"), "b": float("-inf")}
    theirs = transformers.Mamba2Config().to_json_string()
    assert '{\n      "__float__": "Infinity"\n    }' in theirs
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"limit": float("nan")})


@pytest.mark.parametrize("value", ["NaN", '{"__float__": "NaN"}'])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_nan_is_refused(tmp_path, value, file):
    model = LanguageModel(OURS["mamba"])
    save(model, random_params(model), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / file).write_text(text.replace('"hidden_act": "silu"', f'"hidden_act": {value}'))
    with pytest.raises(ValueError, match=rf"{file} cannot be read: it holds a NaN"):
        load(tmp_path)


def test_what_cannot_be_stored_is_refused(tmp_path):
    model = LanguageModel(OURS["mamba"])
    params = random_params(model)
    save(model, params, tmp_path / "narrow", dtype="float16")
    loaded, params = load(tmp_path / "narrow")
    large = {**params, "embedding": {"embedding": params["embedding"]["embedding"] * 1e6}}
    with pytest.raises(ValueError, match=r"embedding/embedding is beyond the range of float16"):
        save(loaded, large, tmp_path / "large")
    double = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    with pytest.raises(ValueError, match=r"has dtype float64, which is not stored; give save a"):
        save(model, double, tmp_path / "double")
    other = LanguageModel(OURS["mamba2"])
    with pytest.raises(ValueError, match=r"is that of a mamba model, but .* is a mamba2 model"):
        save(other, random_params(other), tmp_path / "other", like=tmp_path / "narrow")
    assert [path.name for path in tmp_path.iterdir()] == ["narrow"]
    (tmp_path / "stale").mkdir()
    (tmp_path / "stale" / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has a generation_config\.json already"):
        save(model, params, tmp_path / "stale")
