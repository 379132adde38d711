"""Mixtures of experts against a loop over tokens, and in a backbone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.layers.experts import Experts, ExpertsConfig
from seqmodels.mixers import AttentionConfig, Segments
from seqmodels.models import BackboneConfig
from seqmodels.models.backbone import Backbone, stack_layers
from tests import tolerances

CASES = {
    "shared": ExpertsConfig(experts=5, chosen=2, hidden=6, shared=4, shared_gate=True),
    "shares": ExpertsConfig(experts=4, chosen=3, hidden=5, normalised=False),
    "one": ExpertsConfig(experts=3, chosen=1, hidden=4, shared=3, normalised=False),
}
# DeepSeek's and Nemotron's: sigmoids, groups, a narrower space, squared ReLU.
GROUPED = ExpertsConfig(
    experts=6, chosen=3, hidden=5, shared=4, scores="sigmoid", correction=True, groups=3,
    chosen_groups=2, scale=1.5, latent=4,
)  # fmt: skip


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))


def one_by_one(config, params, x):
    """Each token through its experts, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)

    def silu(z):
        return z / (1 + np.exp(-z))

    y = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        token = x[place]
        shares = np.exp(token @ p["router"]["kernel"])
        shares /= shares.sum()
        chosen = np.argsort(-shares)[: config.chosen]
        total = shares[chosen].sum() if config.normalised else 1.0
        for e in chosen:
            hidden = silu(token @ p["w_gate"][e]) * (token @ p["w_in"][e])
            y[place] += shares[e] / total * (hidden @ p["w_out"][e])
        if config.shared:
            parts = {name: p[f"shared_{name}"]["kernel"] for name in ("gate", "in", "out")}
            shared = silu(token @ parts["gate"]) * (token @ parts["in"]) @ parts["out"]
            if config.shared_gate:
                shared = shared / (1 + np.exp(-(token @ p["shared_router"]["kernel"])))
            y[place] += shared
    return y


def all_experts(config, params, x):
    """Every token through every expert, weighted by a mask: differentiable, nothing is sorted."""
    shares = jax.nn.softmax(x @ params["router"]["kernel"])
    least = jnp.sort(shares, axis=-1)[..., -config.chosen, None]
    weights = jnp.where(shares >= least, shares, 0.0)
    if config.normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    gate, inner = (jnp.einsum("bld,edi->blei", x, params[name]) for name in ("w_gate", "w_in"))
    out = jnp.einsum("blei,eid->bled", jax.nn.silu(gate) * inner, params["w_out"])
    y = jnp.einsum("bled,ble->bld", out, weights)
    if config.shared:
        parts = [params[f"shared_{name}"]["kernel"] for name in ("gate", "in", "out")]
        shared = (jax.nn.silu(x @ parts[0]) * (x @ parts[1])) @ parts[2]
        if config.shared_gate:
            shared = shared * jax.nn.sigmoid(x @ params["shared_router"]["kernel"])
        y = y + shared
    return y


def made(config, length=7, seed=0):
    layer = Experts(config)
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((2, length, 8)).astype(np.float32))
    return layer, jax.device_get(jax.jit(layer.init)(jax.random.key(seed + 1), x)["params"]), x


@pytest.mark.always("shared")
@pytest.mark.parametrize("name", CASES)
def test_each_token_goes_through_its_experts(name):
    layer, params, x = made(CASES[name])
    expected = one_by_one(layer.config, params, x)
    run = jax.jit(layer.apply)
    assert relative(run({"params": params}, x), expected) <= tolerances.FLOAT32
    narrow = run({"params": params}, x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    rounded = one_by_one(layer.config, params, x.astype(jnp.bfloat16))
    assert relative(narrow, rounded) <= tolerances.BFLOAT16_MIXER


@pytest.mark.always("shares", "shared")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_all_experts(name):
    layer, params, x = made(CASES[name])
    weights = np.random.default_rng(9).standard_normal(x.shape).astype(np.float32)

    def loss(forward, params, x):
        return jnp.sum(weights * forward(params, x))

    ours = jax.grad(lambda p, x: loss(lambda p, x: layer.apply({"params": p}, x), p, x), (0, 1))
    dense = jax.grad(lambda p, x: loss(lambda p, x: all_experts(layer.config, p, x), p, x), (0, 1))
    for found, expected in zip(
        *(jax.tree.leaves(jax.jit(gradient)(params, x)) for gradient in (ours, dense)), strict=True
    ):
        assert relative(found, expected) <= tolerances.FLOAT32_MIXER_GRADIENTS


@pytest.mark.always("4")
@pytest.mark.parametrize("latent", [4, None])
def test_sigmoids_choose_within_the_best_groups(latent):
    config = dataclasses.replace(GROUPED, latent=latent)
    layer = Experts(config, "relu2")
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 9, 8)).astype(np.float32))
    params = jax.jit(layer.init)(jax.random.key(4), x)["params"]
    bias = np.array([0.0, 0.3, -0.2, 0.1, 0.2, -0.1], np.float32)
    params = {**params, "correction_bias": bias}
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected, seen = np.zeros(x.shape), set()
    for place in np.ndindex(x.shape[:2]):
        token = np.asarray(x[place], np.float64)
        shares = 1 / (1 + np.exp(-(token @ p["router"]["kernel"])))
        pairs = [sorted(group)[-2:] for group in (shares + p["correction_bias"]).reshape(3, 2)]
        best = sorted(range(3), key=lambda g: -sum(pairs[g]))[:2]
        allowed = [e for e in range(6) if e // 2 in best]
        chosen = sorted(allowed, key=lambda e: -(shares[e] + bias[e]))[:3]
        seen |= {tuple(sorted(chosen))}
        inner = token @ p["latent_in"]["kernel"] if latent else token
        out = sum(
            1.5 * shares[e] / shares[chosen].sum()
            * (np.maximum(inner @ p["w_in"][e], 0) ** 2 @ p["w_out"][e])
            for e in chosen
        )  # fmt: skip
        out = out @ p["latent_out"]["kernel"] if latent else out
        shared = np.maximum(token @ p["shared_in"]["kernel"], 0) ** 2
        expected[place] = out + shared @ p["shared_out"]["kernel"]
    assert len(seen) > 3
    assert relative(jax.jit(layer.apply)({"params": params}, x), expected) <= tolerances.FLOAT32
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, x) ** 2)))(params)
    assert not np.any(gradient["correction_bias"])
    assert np.all([np.any(leaf) for name, leaf in gradient.items() if name != "correction_bias"])


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="groups=4 must divide experts=6"):
        dataclasses.replace(GROUPED, groups=4)
    with pytest.raises(ValueError, match="chosen_groups=1 must be at most groups=3 and hold"):
        dataclasses.replace(GROUPED, chosen_groups=1)


@pytest.mark.full
def test_an_expert_that_nobody_chooses_has_no_gradient():
    layer, params, x = made(CASES["one"])
    kernel = np.array(params["router"]["kernel"])
    kernel[:, 1] = 0.0
    x = jnp.abs(x)
    kernel[:, 0], kernel[:, 2] = 5.0, -5.0  # of positive tokens all choose the first
    params = {**params, "router": {"kernel": jnp.asarray(kernel)}}
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, x) ** 2)))(params)
    assert np.all(gradient["w_in"][1:] == 0)
    assert np.any(gradient["w_in"][0] != 0)


def test_the_loss_of_balance_counts_tokens_and_not_padding():
    layer, params, x = made(CASES["shares"], length=6)
    mask = np.array([[True] * 4 + [False] * 2, [True] * 6])
    run = jax.jit(functools.partial(layer.apply, mutable=["losses"]))
    _, sown = run({"params": params}, x, mask)
    shares = np.asarray(jax.nn.softmax(x @ params["router"]["kernel"]))[mask]
    used = np.zeros(4)
    for row in shares:
        used[np.argsort(-row)[:3]] += 1
    expected = 4 * np.sum(used / len(shares) * shares.mean(axis=0))
    np.testing.assert_allclose(
        sown["losses"]["load_balance"][0], expected, **tolerances.EACH_FLOAT32_SUM
    )
    even = {**params, "router": {"kernel": jnp.zeros_like(params["router"]["kernel"])}}
    _, sown = run({"params": even}, x)
    np.testing.assert_allclose(sown["losses"]["load_balance"][0], 3.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": 6}, "chosen=6 must be at most experts=5"),
        ({"shared": None}, "shared_gate=True needs a shared MLP"),
        ({"hidden": 0}, "hidden=0 must be positive"),
    ],
)
def test_wrong_configurations_of_experts_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ExpertsConfig(**({"experts": 5, "chosen": 2, "hidden": 6, "shared": 4,
                          "shared_gate": True} | fields))  # fmt: skip


def stack(**fields):
    return BackboneConfig(
        **({
            "layout": ("attention",) * 4, "mixers": (AttentionConfig(heads=2),), "width": 8,
            "mlp_kind": "swiglu", "experts": CASES["shared"],
        } | fields)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp": 8}, r"mlp=8 is that of dense_blocks=\(\); give both, or none"),
        ({"dense_blocks": (1,)}, r"mlp=None is that of dense_blocks=\(1,\)"),
        ({"mlp": 8, "dense_blocks": (4,)}, r"dense_blocks=\(4,\) must be below the number of"),
        ({"experts": None, "dense_blocks": (1,)}, "set experts, or dense_blocks"),
        ({"mlp_tile": 4}, "experts need mlp_tile=None, not 4"),
        ({"single": True}, "single=True experts=.* needs a block 'experts' in layout"),
        ({"single": True, "layout": ("experts", "attention"), "mlp": 4}, "mlp=4 needs a block"),
        (
            {"single": True, "layout": ("experts", "attention"), "dense_blocks": (1,)},
            "layout says which blocks have experts, not dense_blocks",
        ),
    ],
)
def test_experts_that_fit_no_backbone_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        stack(**fields)


@pytest.mark.full
def test_experts_in_every_second_block_scanned_or_not():
    config = stack(mlp=10, dense_blocks=(0, 2))
    assert config.period == 2
    assert [config.second(layer) for layer in range(4)] == ["mlp", "experts"] * 2
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    params = jax.jit(Backbone(config).init)(jax.random.key(1), x)["params"]
    assert {"mlp_in", "mlp_gate", "mlp_out"} <= params["block_0"].keys()
    assert "experts" in params["block_1"]
    assert "mlp_in" not in params["block_1"]
    scanned = stack(mlp=10, dense_blocks=(0, 2), scan_layers=True)
    ids = jnp.array([[1, 1, 2, 2, 0, 0], [1] * 6], jnp.int32)
    segments = Segments.from_ids(ids)

    def outputs(config, params):
        return jax.jit(
            lambda p: Backbone(config).apply(
                {"params": p}, x, segments=segments, mutable=["losses"]
            )
        )(params)

    one, sown = outputs(config, params)
    two, stacked = outputs(scanned, stack_layers(scanned, params))
    np.testing.assert_allclose(two[0], one[0], **tolerances.EACH_FLOAT32_LAYER)
    apart = [sown["losses"][f"block_{i}"]["experts"]["load_balance"][0] for i in (1, 3)]
    together = stacked["losses"]["period"]["block_1"]["experts"]["load_balance"][0]
    np.testing.assert_allclose(together, apart, **tolerances.EACH_FLOAT32_SUM)
