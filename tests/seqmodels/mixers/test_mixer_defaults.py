"""Every mixer: its default configuration fits the widths that people take."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels.mixers import REGISTRY, BidirectionalConfig, HGRN2Config, MambaConfig, build
from tests.tiers import one_of_many


@pytest.mark.parametrize("width", one_of_many((64, 128, 256, 512, 768), [64]))
@pytest.mark.parametrize("name", REGISTRY)
def test_defaults_fit_common_widths(name, width):
    config = BidirectionalConfig(MambaConfig()) if name == "bidirectional" else REGISTRY[name][0]()
    mixer, x = build(config, width), jax.ShapeDtypeStruct((1, 3, width), jnp.float32)
    (y, _), variables = jax.eval_shape(mixer.init_with_output, jax.random.key(0), x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert jax.tree.leaves(variables["params"])
    # Anything else would be carried as if it were trained: losses are sown when a layer is used.
    assert set(variables) == {"params"}


@pytest.mark.parametrize(("width", "heads", "size"), [(64, 1, 64), (768, 6, 128), (96, 3, 32)])
def test_hgrn2_chooses_its_heads(width, heads, size):
    assert build(HGRN2Config(), width).sizes == (heads, heads, size, size)
    with pytest.raises(ValueError, match="head_size=80 must divide the width"):
        _ = build(HGRN2Config(head_size=80), width).sizes
