"""A language model exported with a symbolic batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from seqmodels.mixers import GLAConfig, MambaConfig
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig
from tests import tolerances
from tests.pallas_kernels.export_checks import DISABLED_CHECKS, symbols_as_sizes


@pytest.mark.full
@pytest.mark.all_platforms
def test_a_model_is_exported_for_any_batch_and_each_platform():
    stack = BackboneConfig(
        layout=("mamba", "gla"),
        mixers=(MambaConfig(state_size=3), GLAConfig(heads=2, gate_rank=3)),
        width=8,
        norm="rms",
    )
    model = LanguageModel(LanguageModelConfig(stack, vocabulary_size=11))
    tokens = np.arange(15, dtype=np.int32).reshape(3, 5) % 11
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    run = jax.jit(lambda variables, tokens: model.apply(variables, tokens)[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("b, 5"), jnp.int32)
    with symbols_as_sizes():
        exported = {
            platform: export.export(run, platforms=[platform], disabled_checks=DISABLED_CHECKS)(
                shapes, symbolic
            )
            for platform in ("cpu", "tpu", "cuda")
        }
    assert "tpu_custom_call" in exported["tpu"].mlir_module()
    for batch in (1, 3):
        expected = run(variables, tokens[:batch])
        np.testing.assert_allclose(
            exported["cpu"].call(variables, tokens[:batch]),
            expected,
            **tolerances.EACH_FLOAT32_OUTPUT,
        )
