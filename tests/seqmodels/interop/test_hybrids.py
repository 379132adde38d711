"""Hybrids of published families against transformers: long rows, packing, tuning, bfloat16."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from seqmodels.generation import feed, start
from seqmodels.interop.huggingface import load, save
from seqmodels.mixers import Segments
from tests import tolerances
from tests.pytorch import torch
from tests.seqmodels.interop.checkpoints import families, relative, written_by_transformers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

HYBRIDS = (
    "qwen3_5_text", "qwen3_next", "lfm2", "bamba", "granitemoehybrid", "granite-experts",
    "jamba", "nemotron_h", "nemotron-experts", "falcon_h1", "falcon-norm",
)  # fmt: skip
LONG = np.random.default_rng(1).integers(3, 40, (1, 300)).astype(np.int32)


@pytest.fixture(scope="module", params=families(HYBRIDS, {"qwen3_next"}))
def hybrid(request, tmp_path_factory):
    """Our model, its parameters, and transformers' model."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = written_by_transformers(request.param, folder, noise=0.1)
    return *load(folder), theirs


def their_logits(theirs, ids):
    with torch.no_grad():
        mask = torch.ones(ids.shape)
        return theirs(torch.tensor(ids), attention_mask=mask).logits.float().numpy()


def test_the_text_model_of_a_checkpoint_with_images_is_read(tmp_path):
    written_by_transformers("qwen3_5_text", tmp_path / "text")
    arrays = load_file(tmp_path / "text" / "model.safetensors")
    around = {"model.visual.blocks.0.norm.weight": np.ones(3, np.float32),
              "mtp.norm.weight": np.ones(3, np.float32)}  # fmt: skip
    for name, array in arrays.items():
        around[name.replace("model.", "model.language_model.", 1)] = array
    folder = tmp_path / "images"
    folder.mkdir()
    save_file(around, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    config = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    model, params = load(folder)
    plain, expected = load(tmp_path / "text")
    assert model.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    save(model, params, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[name], array) for name, array in arrays.items())
    assert load(tmp_path / "again")[0].config == plain.config
    (folder / "config.json").write_text(json.dumps(config | {"text_config": None}))
    with pytest.raises(ValueError, match="text_config=None is not an object"):
        load(folder)


def test_long_and_packed_rows_have_their_logits(hybrid):
    model, params, theirs = hybrid
    apply = jax.jit(
        lambda ids, segments: model.apply({"params": params}, ids, segments=segments)[0]
    )
    cut = 110
    ids = np.array([[1] * cut + [2] * (300 - cut)], np.int32)
    whole, packed = apply(LONG, None), apply(LONG, Segments.from_ids(ids))
    assert relative(whole, their_logits(theirs, LONG)) <= tolerances.FLOAT32_PUBLISHED
    apart = [their_logits(theirs, part) for part in (LONG[:, :cut], LONG[:, cut:])]
    assert relative(packed, np.concatenate(apart, axis=1)) <= tolerances.FLOAT32_PUBLISHED


@pytest.mark.full
def test_a_prompt_in_chunks_ends_with_their_logits(hybrid):
    model, params, theirs = hybrid
    expected = their_logits(theirs, LONG)
    stream = start(model, batch_size=1, max_length=300, dtype=jnp.float32)
    at = 0
    for size in (100, 7, 1, 1, 191):
        stream = feed(model, {"params": params}, stream, LONG[:, at : at + size])
        at += size
        error = relative(np.asarray(stream.logits), expected[:, at - 1])
        assert error <= tolerances.FLOAT32_PUBLISHED


@pytest.mark.full
def test_bfloat16_is_as_near_to_float32_as_theirs(hybrid, tmp_path):
    _, params, theirs = hybrid
    theirs.save_pretrained(tmp_path)
    exact = their_logits(theirs, LONG)
    narrow, _ = load(tmp_path, dtype="bfloat16")
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    ours = np.asarray(jax.jit(lambda p: narrow.apply({"params": p}, LONG)[0])(rounded))
    again = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    error, their_error = (
        np.sqrt(np.mean((logits - exact) ** 2)) for logits in (ours, their_logits(again, LONG))
    )
    assert 0 < error <= 2 * their_error


def their_step(theirs, folder, dtype):
    """Their loss, and the gradient of every parameter under our names."""
    tuned = copy.deepcopy(theirs).to(dtype)
    tuned.set_experts_implementation("eager")  # the fast one is of single precision
    ids = torch.tensor(LONG.astype(np.int64))
    output = tuned(ids, attention_mask=torch.ones(ids.shape), labels=ids)
    output.loss.backward()
    # Written as a checkpoint and loaded, gradients have our names and shapes.
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.copy_(parameter.grad)
        for buffer in tuned.buffers():
            buffer.zero_()
    tuned.float().save_pretrained(folder)
    return output.loss.item(), load(folder)[1]


def test_loss_and_gradients_of_a_step_of_tuning_are_theirs(hybrid, tmp_path):
    """Near theirs in double precision; of decays, nearly as near as theirs in single precision."""
    model, params, theirs = hybrid
    expected_loss, expected = their_step(theirs, tmp_path / "double", torch.float64)
    _, single = their_step(theirs, tmp_path / "single", torch.float32)

    def loss(params):
        logits = model.apply({"params": params}, LONG)[0][:, :-1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, LONG[:, 1:]))

    def error(found, gradient):
        return np.sqrt(np.mean((found - gradient) ** 2))

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected_loss, **tolerances.EACH_FLOAT32_TOTAL)
    trees = zip(*map(jax.tree.leaves, (gradients, expected, single)), strict=True)
    for (path, _), (found, gradient, other) in zip(
        jax.tree_util.tree_leaves_with_path(gradients), trees, strict=True
    ):
        allowed = tolerances.FLOAT32_PUBLISHED * np.sqrt(np.mean(gradient**2))
        if path[-1].key in ("A_log", "dt_bias"):  # sums over tokens that cancel
            allowed = max(allowed, 3 * error(other, gradient))
        assert error(found, gradient) <= allowed, jax.tree_util.keystr(path)
