"""Checkpoints read onto a mesh, tensor by tensor."""

import json
import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from seqmodels.interop.huggingface import load, save
from seqmodels.layers.experts import ExpertsConfig
from seqmodels.mixers import AttentionConfig, Mamba2Config
from seqmodels.models import LanguageModel, param_axes
from seqmodels.models.published import hybrid_language_model
from seqmodels.parallel import make_mesh, parameter_shardings
from tests.seqmodels.interop.checkpoints import OURS, families, random_params


@pytest.mark.parametrize("name", families(OURS, {"qwen3_next", "bamba"}))
def test_a_checkpoint_is_read_as_a_trainer_splits_it(name, tmp_path):
    model = LanguageModel(OURS[name])
    save(model, random_params(model), tmp_path)
    _, expected = load(tmp_path)
    mesh = make_mesh(data=2, model=2, seq=2)
    loaded, params = load(tmp_path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    shardings = parameter_shardings(param_axes(loaded.config, params), params, mesh)
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    assert not any(leaf.sharding.is_fully_replicated for leaf in matrices)


@pytest.mark.always("mlp")
@pytest.mark.parametrize(
    "experts", [None, ExpertsConfig(4, 2, 128, shared=64)], ids=["mlp", "experts"]
)
def test_the_host_holds_no_more_than_a_file_of_several(experts, tmp_path):
    layout = ("mamba2", "attention") * 4
    mixers = Mamba2Config(state_size=16, head_size=32), AttentionConfig(heads=4)
    model = LanguageModel(
        hybrid_language_model(
            layout, mixers, 128, 256 if experts is None else None, 1000, tie_embeddings=False,
            norm_epsilon=1e-5, experts=experts, residual_scale=0.5,
        )
    )  # fmt: skip
    size = 2_000_000
    save(model, random_params(model), tmp_path, max_file_bytes=size)
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(files) > 3
    mesh = make_mesh(data=4, model=2)
    load(tmp_path, mesh=mesh)  # what is made once
    tracemalloc.start()
    _, params = load(tmp_path, mesh=mesh)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > 3 * size
    assert peak < size


def test_numbers_that_are_none_are_warned_of(tmp_path):
    model = LanguageModel(OURS["mamba"])
    save(model, random_params(model), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = load_file(path)
    arrays["backbone.layers.1.mixer.D"][2] = np.nan
    save_file(arrays, path)
    with pytest.warns(UserWarning, match=r"tensor backbone.layers.1.mixer.D holds NaN or infinite"):
        _, params = load(tmp_path)
    assert jnp.isnan(params["backbone"]["block_1"]["mixer"]["D"][2])


def test_an_unknown_kind_of_model_is_named_with_the_nearest(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_nxt"}))
    with pytest.raises(
        ValueError, match="model_type='qwen3_nxt' is not known, the nearest is 'qwen3_next'"
    ):
        load(tmp_path)
