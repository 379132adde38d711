"""Streams of any length: what a mixer answers does not depend on how far the document has come."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checkpoint_attention import Cache
from seqmodels.mixers import (
    AttentionConfig,
    RATConfig,
    RetNetConfig,
    RGLRUConfig,
    SCOUTConfig,
    Segments,
    SlidingWindowConfig,
    build,
)
from tests import tolerances
from tests.tiers import one_of_many

WIDTH, SEEN, MORE = 8, 9, 6
STARTS = [2**24, 2**31 - 1 - SEEN, 2**31 - SEEN - 4, -SEEN - 2]
ENDLESS = {
    "window": SlidingWindowConfig(heads=2, window=7, init_std=0.5),
    "sinks": SlidingWindowConfig(heads=2, window=5, sinks=2, rotary_base=None, init_std=0.5),
    "retnet": RetNetConfig(heads=2, init_std=0.5, implementation="reference"),
    "rg_lru": RGLRUConfig(heads=2, implementation="reference"),
}


@pytest.mark.always("sinks-False", "rg_lru-True")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("case", one_of_many(ENDLESS, ["sinks", "rg_lru"]))
def test_a_stream_has_no_end(case, named):
    mixer = build(ENDLESS[case], WIDTH)
    x = np.random.default_rng(1).standard_normal((1, SEEN + MORE, WIDTH)).astype(np.float32)
    variables = jax.jit(mixer.init)(jax.random.key(0), x[:, :1])
    segments = jax.jit(Segments.from_ids)(np.full((1, MORE), 1, np.int32)) if named else None

    @jax.jit
    def after(state, position):
        """Nothing is kept of tokens before the first nine but a state that does not count."""
        state = dataclasses.replace(state, position=position)
        _, state = mixer.apply(variables, x[:, :SEEN], state=state)
        y, last = mixer.apply(variables, x[:, SEEN:], state=state, segments=segments)
        return y, last.position

    start = mixer.initial_state(1, dtype=jnp.float32)
    # What stays of a beginning, sinks and a retention's sum, is the same for all starts.
    expected, _ = after(start, jnp.asarray([100], jnp.int32))
    for position in STARTS:
        y, last = after(start, jnp.asarray([position], jnp.int32))
        np.testing.assert_allclose(
            y, expected, atol=tolerances.FLOAT32_OF_LARGEST * np.abs(expected).max()
        )
        distance = (int(last[0]) - position) % 2**31
        assert distance == SEEN + MORE


@pytest.mark.full
@pytest.mark.parametrize(
    "config", one_of_many([AttentionConfig, RATConfig, SCOUTConfig], [SCOUTConfig])
)
def test_a_cache_stays_full(config):
    mixer = build(config(heads=2), WIDTH)
    x = np.random.default_rng(1).standard_normal((1, 4, WIDTH)).astype(np.float32)
    variables = jax.jit(mixer.init)(jax.random.key(0), x[:, :1])
    state = mixer.initial_state(1, max_length=20, dtype=jnp.float32)
    for position in (2**31 - 2, -2):
        far = dataclasses.replace(state, position=jnp.asarray([position], jnp.int32))
        y, after = jax.jit(mixer.apply)(variables, x, state=far)
        assert np.isnan(y).all()
        assert after.position[0] < 0
    with pytest.raises(ValueError, match=r"max_length=2147483648 must be below 2\*\*31"):
        mixer.initial_state(1, max_length=2**31)


def test_a_cache_of_checkpoints_counts_as_far_as_it_can():
    cache = Cache.empty(2, 6, 1, 2, 2, interval=3, dtype=jnp.float32)
    cache = cache._replace(position=jnp.asarray([2**31 - 3, 2], jnp.int32))
    k = jnp.ones((2, 5, 1, 2))
    after = jax.jit(functools.partial(cache.extend, interval=3))(k, k)
    np.testing.assert_array_equal(after.position, [2**31 - 1, 7])
    np.testing.assert_array_equal(after.k[:, :, 0, 0], [[0, 0], [1, 1]])
    past = after.past(3)
    np.testing.assert_array_equal(past["past_length"], [2, 2])
    np.testing.assert_array_equal(past["offset"], [(2**31 - 1) % 3, 1])
