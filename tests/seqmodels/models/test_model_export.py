"""`docs/export.md`, run as it stands: a language model written by `jax.export` and read again."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from experiments.lm import presets
from pallas_kernels.common import dispatch
from pallas_kernels.tools import testing
from seqmodels.mixers import REGISTRY
from seqmodels.models import LanguageModel
from tests import tolerances
from tests.pallas_kernels.export_checks import symbols_as_sizes
from tests.tiers import one_of_many

PAGE = Path(__file__).parents[3] / "docs" / "export.md"
CAUSAL = [name for name in REGISTRY if name not in ("bidirectional", "hydra", "jrt", "orchid")]


@pytest.fixture(autouse=True)
def _symbols_as_sizes():
    with symbols_as_sizes():
        yield


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_page(tmp_path, monkeypatch):
    pytest.importorskip("flatbuffers", reason="jax.export writes files with flatbuffers")
    monkeypatch.chdir(tmp_path)
    said = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, said)
    read, step, variables = said["read"], said["step"], said["variables"]
    logits, states = read(variables, said["text"])
    assert_same_bits(said["read_again"](variables, said["text"]), (logits, states))
    for _ in range(8):
        token = logits[:, -1:].argmax(-1).astype(jnp.int32)
        logits, states = step(variables, token, states)
    assert_same_bits((said["logits"], said["states"]), (logits, states))


@pytest.mark.all_platforms
@pytest.mark.parametrize("mixer", one_of_many(CAUSAL, ["attention"]))
def test_any_number_of_rows_on_two_platforms(mixer):
    model = LanguageModel(presets.language_model(mixer, presets.SIZES["tiny"]))
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    run = jax.jit(model.apply)
    rows = export.symbolic_shape("rows")[0]
    any_rows = jax.ShapeDtypeStruct((rows, 16), jnp.int32)
    with dispatch.preferring("xla"):
        exported = export.export(jax.jit(model.apply), platforms=["cpu", "tpu"])
        exported = exported(variables, any_rows)
    # Two programs, of which XLA fuses each in its own way: equal up to rounding.
    testing.assert_close(
        exported.call(variables, tokens), run(variables, tokens), tolerances.FLOAT32
    )
