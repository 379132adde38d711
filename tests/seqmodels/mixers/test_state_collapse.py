"""Mamba-2 whose state is kept from collapsing: against loops, and against Mamba-2 as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.config import from_dict, to_dict
from seqmodels.mixers import Mamba2Config, Segments, build
from seqmodels.mixers.state_collapse import (
    ForgetMore,
    NormaliseState,
    WindowState,
    mitigated_ssd,
)
from tests import tolerances
from tests.tiers import one_of_many

B, L, H, N, P = 2, 12, 2, 3, 4
WIDTH = 8
CONFIG = Mamba2Config(state_size=4, head_size=4, groups=2)


def operands(seed=0):
    rng = np.random.default_rng(seed)
    x, k, q = (rng.normal(size=(B, L, H, size)) for size in (P, N, N))
    return x, -rng.uniform(0.01, 0.5, (B, L, H)), k, q


def loop(x, log_decay, k, q, start, change=lambda state: state):
    """In float64, token by token; outputs and last state."""
    state, out = start.copy(), []
    for t in range(x.shape[1]):
        outer = np.einsum("bhn,bhp->bhnp", k[:, t], x[:, t])
        state = change(np.exp(log_decay[:, t])[..., None, None] * state + outer)
        out.append(np.einsum("bhnp,bhn->bhp", state, q[:, t]))
    return np.stack(out, axis=1), state


def mitigated(mitigation, operands, start):
    arrays = (jnp.asarray(part, jnp.float32) for part in (*operands, start))
    return jax.jit(mitigated_ssd, static_argnums=0)(mitigation, *arrays)


def test_forgetting_more_scales_decays_and_inputs():
    x, log_decay, k, q = operands()
    start = np.random.default_rng(1).normal(size=(B, H, N, P))
    found = mitigated(ForgetMore(decay=0.9, insert=0.5), (x, log_decay, k, q), start)
    expected = loop(x, log_decay + np.log(0.9), 0.5 * k, q, start)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **tolerances.EACH_FLOAT32_LAYER)


def test_a_state_is_scaled_down_to_the_limit():
    arrays = operands()
    start = np.zeros((B, H, N, P))

    def clipped(state):
        norm = np.sqrt((state**2).sum(axis=(-2, -1), keepdims=True))
        return np.where(norm > 1.5, 1.5 * state / norm, state)

    found = mitigated(NormaliseState(1.5), arrays, start)
    expected = loop(*arrays, start, clipped)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **tolerances.EACH_FLOAT32_LAYER)
    assert np.abs(expected[0] - loop(*arrays, start)[0]).max() > 0.1


@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
def test_a_window_is_the_state_of_its_last_tokens(tokens):
    x, log_decay, k, q = operands()
    found, _ = mitigated(WindowState(tokens), (x, log_decay, k, q), np.zeros((B, H, N, P)))
    for t in range(L):
        part = slice(max(t + 1 - tokens, 0), t + 1)
        arrays = (array[:, part] for array in (x, log_decay, k, q))
        expected, _ = loop(*arrays, np.zeros((B, H, N, P)))
        np.testing.assert_allclose(found[:, t], expected[:, -1], **tolerances.EACH_FLOAT32_LAYER)


def layer(mitigation, segments=None, x=None):
    config = dataclasses.replace(CONFIG, mitigation=mitigation)
    x = jax.random.normal(jax.random.key(0), (B, L, WIDTH)) if x is None else x
    variables = jax.jit(build(CONFIG, WIDTH).init)(jax.random.key(1), x)
    apply = jax.jit(lambda x: build(config, WIDTH).apply(variables, x, segments=segments))
    return apply(x)


@pytest.mark.full
@pytest.mark.parametrize(
    "mitigation", one_of_many([ForgetMore(), NormaliseState(1e6), WindowState(L)], [WindowState(L)])
)
def test_what_does_nothing_changes_nothing(mitigation):
    """With the parameters of a layer without, and padding at the end."""
    ids = jnp.asarray([[1] * L, [1] * (L - 4) + [0] * 4])
    segments = Segments.from_ids(ids, single=True)
    (y, state), (expected, before) = layer(mitigation, segments), layer(None, segments)
    np.testing.assert_allclose(y, expected, **tolerances.EACH_FLOAT32_LAYER)
    if isinstance(mitigation, WindowState):
        assert state is None
        return
    for ours, theirs in zip(*map(jax.tree.leaves, (state, before)), strict=True):
        np.testing.assert_allclose(ours, theirs, **tolerances.EACH_FLOAT32_LAYER)


def test_what_it_cannot_serve_is_refused():
    config = dataclasses.replace(CONFIG, mitigation=WindowState(4))
    assert (config.stateful, config.supports_packing) == (False, False)
    with pytest.raises(ValueError, match="initial_state is refused, mitigation=WindowState"):
        build(config, WIDTH).initial_state(1)
    several = Segments.from_ids(jnp.asarray([[1] * 6 + [2] * 6] * B))
    with pytest.raises(ValueError, match="several documents a row are not supported"):
        layer(ForgetMore(0.9), several)
    with pytest.raises(ValueError, match=r"ForgetMore: decay=1.5 must be in \(0, 1\]"):
        ForgetMore(decay=1.5)
    for mitigation in (None, ForgetMore(0.5, 0.5), NormaliseState(2.0), WindowState(3)):
        one = dataclasses.replace(CONFIG, mitigation=mitigation)
        assert from_dict(Mamba2Config, to_dict(one)) == one
