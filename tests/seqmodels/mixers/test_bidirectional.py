"""Reading backwards is flipping: every causal mixer, wrapped, against flipped documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.config import from_dict, to_dict
from seqmodels.mixers import BidirectionalConfig, MixerConfig, S5Config, Segments, build
from tests import tolerances
from tests.seqmodels.mixers.cases import CASES
from tests.tiers import one_of_many

WIDTH = 4
# Two documents, one and padding, padding only; and one document a row.
PACKED = np.array([[3] * 5 + [5] * 5, [1] * 5 + [0] * 5, [0] * 10], np.int32)
ALONE = np.where(PACKED > 0, 1, 0)
CAUSAL = [case for case, config in CASES.items() if config.causal]


def documents(ids):
    """``(row, slice)`` of each document."""
    for row, line in enumerate(ids):
        for name in dict.fromkeys(line[line > 0].tolist()):
            where = np.flatnonzero(line == name)
            yield row, slice(where[0], where[-1] + 1)


@pytest.mark.always("gla")
@pytest.mark.parametrize("case", one_of_many(CAUSAL, ["s4d", "gla"]))
def test_reverse_is_flip(case):
    config = CASES[case]
    ids = PACKED if config.supports_packing else ALONE
    mixer, one = build(BidirectionalConfig(config), WIDTH), build(config, WIDTH)
    x = jax.random.normal(jax.random.key(1), (*ids.shape, WIDTH))
    segments = Segments.from_ids(ids, single=not config.supports_packing)
    params = jax.jit(mixer.init)(jax.random.key(0), x)["params"]
    y, _ = jax.jit(mixer.apply)({"params": params}, x, segments=segments)
    run = jax.jit(lambda params, x: one.apply({"params": params}, x)[0])
    expected = np.zeros_like(y)
    for row, part in documents(ids):
        alone = x[row : row + 1, part]
        expected[row, part] += run(params["left"], alone)[0]
        expected[row, part] += np.flip(run(params["right"], jnp.flip(alone, 1))[0], 0)
    np.testing.assert_allclose(y, expected, **tolerances.EACH_FLOAT32_OUTPUTS)


def test_tied_directions_share_parameters():
    x = jax.random.normal(jax.random.key(1), (1, 7, WIDTH))
    mixer = build(BidirectionalConfig(CASES["s5"], tied=True), WIDTH)
    variables = jax.jit(mixer.init)(jax.random.key(0), x)
    assert variables["params"].keys() == {"left"}
    run = jax.jit(lambda x: mixer.apply(variables, x)[0])
    np.testing.assert_allclose(
        run(jnp.flip(x, 1)), jnp.flip(run(x), 1), **tolerances.EACH_FLOAT32_FLIPPED
    )


def test_config():
    config = BidirectionalConfig(S5Config(state_size=8), tied=True)
    assert from_dict(MixerConfig, to_dict(config)) == config
    deep = BidirectionalConfig(CASES["hgrn2"]).at(2, 5)
    assert (deep.local.layer, deep.local.layers) == (2, 5)
    with pytest.raises(ValueError, match=r"local=.* sees both sides already; .* bidirectional=Fal"):
        BidirectionalConfig(S5Config(bidirectional=True))
