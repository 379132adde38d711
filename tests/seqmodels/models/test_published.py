"""Published sizes: as many parameters as transformers' models have."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from seqmodels.interop.huggingface import described
from seqmodels.models import LanguageModel
from seqmodels.models.published import BY_SIZE, PUBLISHED, gemma_embedding_scale
from tests.pytorch import torch, transformers

# Hyena's is counted by hand from its published configuration.
CERTAIN = {"mamba-130m": 129_135_360, "mamba-2.8b": 2_768_345_600, "hyena-153m": 152_483_904}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    config = PUBLISHED[name]
    stack = dataclasses.replace(config.backbone, scan_layers=True)
    model = LanguageModel(dataclasses.replace(config, backbone=stack))
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    family, fields = described(config)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(family.model_type, **fields)
        )
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    assert count == CERTAIN.get(name, count)


@pytest.mark.parametrize("name", BY_SIZE)
def test_other_models_are_about_as_large_as_their_names_say(name):
    model = LanguageModel(BY_SIZE[name])
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    millions = int(name.split("-")[-1].removesuffix("m"))
    assert abs(count / (millions * 1e6) - 1) < 0.04
    assert count == CERTAIN.get(name, count)


def test_gemma_rounds_its_scale():
    assert gemma_embedding_scale(2560) == 50.5
    assert gemma_embedding_scale(4096) == 64.0
