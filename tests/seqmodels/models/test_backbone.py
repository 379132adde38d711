"""Backbone: layout, scanning over layers, state, marks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.mixers import S4DConfig, S5Config, Segments
from seqmodels.models import Backbone, BackboneConfig, marks, stack_layers, unstack_layers

S5_SMALL = S5Config(state_size=4, blocks=1)
S4D_SMALL = S4DConfig(state_size=4)
CONFIG = BackboneConfig(
    layout=("s5", "s4d") * 2 + ("s5",),
    mixers=(S5_SMALL, S4D_SMALL),
    width=4,
    norm="batch",
    gate="half_glu2",
    mlp=6,
    final_norm=True,
)
X = jax.random.normal(jax.random.key(0), (2, 6, 4))
SEGMENTS = Segments.from_ids(np.array([[1, 1, 2, 2, 2, 0], [1] * 6], np.int32))


def init(config):
    return jax.jit(Backbone(config).init)(jax.random.key(0), X)


def abstract(config):
    """Shapes of the variables, without computing them."""
    return jax.eval_shape(Backbone(config).init, jax.random.key(0), X)


def converted(convert, config, variables):
    return {name: convert(config, collection) for name, collection in variables.items()}


def test_period_and_repeats():
    assert (CONFIG.period, CONFIG.repeats) == (2, 0)
    scanned = dataclasses.replace(CONFIG, scan_layers=True)
    assert scanned.repeats == 2
    griffin = dataclasses.replace(scanned, layout=("s5", "s5", "s4d") * 8 + ("s5", "s5"))
    assert (griffin.period, griffin.repeats) == (3, 8)
    alone = dataclasses.replace(scanned, layout=("s5", "s4d", "s4d"))
    assert (alone.period, alone.repeats) == (3, 0)


def test_scanned_equals_unrolled_with_state_segments_and_gradients():
    scanned_config = dataclasses.replace(CONFIG, scan_layers=True)
    variables = init(CONFIG)
    stacked = converted(stack_layers, CONFIG, variables)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, abstract(scanned_config))
    back = converted(unstack_layers, CONFIG, stacked)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))

    start = jax.tree.map(lambda part: part + 1, Backbone(CONFIG).initial_state(2))

    def run(config, variables):
        model = Backbone(config)

        def loss(params):
            bound = {"params": params, "batch_stats": variables["batch_stats"]}
            y, state = model.apply(bound, X, segments=SEGMENTS, state=start)
            return jnp.sum(jnp.sin(y)), (y, state)

        (_, outputs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            variables["params"]
        )
        return outputs, gradient

    outputs, gradient = run(CONFIG, variables)
    scanned_outputs, scanned_gradient = run(scanned_config, stacked)
    assert len(outputs[1]) == len(CONFIG.layout)
    assert jax.tree.structure(outputs) == jax.tree.structure(scanned_outputs)
    scanned_gradient = unstack_layers(CONFIG, scanned_gradient)
    for one, two in ((outputs, scanned_outputs), (dict(gradient), scanned_gradient)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two)


def test_layers_of_a_scan_start_different():
    config = dataclasses.replace(CONFIG, layout=("s5",) * 2, mixers=(S5_SMALL,), scan_layers=True)
    kernel = init(config)["params"]["period"]["block_0"]["gate"]["gate"]["kernel"]
    assert kernel.shape == (2, 4, 4)
    assert np.any(kernel[0] != kernel[1])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    config = dataclasses.replace(CONFIG, layout=("s5",), mixers=(S5_SMALL,), norm="layer")
    params = init(config)["params"]

    def gradient(config):
        loss = lambda p: jnp.sum(jnp.sin(Backbone(config).apply({"params": p}, X)[0]))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradient(dataclasses.replace(config, remat=remat)),
        gradient(config),
    )


@pytest.mark.parametrize("prenorm", [True, False])
def test_block_order(prenorm):
    config = BackboneConfig(
        layout=("s5",), mixers=(S5_SMALL,), width=4, norm="layer", prenorm=prenorm
    )
    y = np.asarray(jax.jit(Backbone(config).apply)(init(config), X)[0])
    normalised = np.allclose(y.mean(-1), 0, atol=1e-5) and np.allclose(y.var(-1), 1, atol=1e-3)
    assert normalised != prenorm


def test_chunks_with_carried_state_equal_the_whole():
    config = dataclasses.replace(CONFIG, layout=("s5", "s4d"), norm="rms")
    model, variables = Backbone(config), init(config)
    whole, state = jax.jit(model.apply)(variables, X)
    run = jax.jit(lambda x, s: model.apply(variables, x, state=s))
    first, carried = run(X[:, :4], model.initial_state(2))
    second, carried = run(X[:, 4:], carried)
    pieces = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(pieces, whole, rtol=2e-4, atol=2e-5)
    assert jax.tree.structure(carried) == jax.tree.structure(state)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_marks(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers, decay_vectors=False)
    params = abstract(config)["params"]
    tree = marks(config, {"backbone": params})["backbone"]
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    blocks = tree["period"] if scan_layers else tree
    s5, s4d = blocks["block_0"], blocks["block_1"]
    assert s5["mixer"]["Lambda_re"] == S5_SMALL.marks()["Lambda_re"]
    assert s4d["mixer"]["log_dt"] == S4D_SMALL.marks()["log_dt"]
    assert (s5["gate"]["gate"]["kernel"].group, s5["gate"]["gate"]["kernel"].weight_decay) == (
        "main",
        True,
    )
    assert not s5["gate"]["gate"]["bias"].weight_decay
    assert not s5["norm"]["batch"]["scale"].weight_decay
    assert s5["norm"]["batch"]["scale"].float32
    assert tree["final_norm"]["batch"]["bias"].float32
    decayed = marks(dataclasses.replace(config, decay_vectors=True), params)
    assert decayed["final_norm"]["batch"]["bias"].weight_decay


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": ("s5", "mamba")}, "layout=.*must name every config"),
        ({"layout": ()}, "layout=.*must name every config"),
        ({"mixers": (S5_SMALL, S5_SMALL, S4D_SMALL)}, "one config a name"),
        ({"width": 0}, "width=0 must be positive"),
        ({"mlp": 0}, "mlp=0 must be None or positive"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"batchnorm_momentum": -0.1}, r"batchnorm_momentum=-0.1 must be in \[0, 1\)"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_state_of_the_wrong_length_is_refused():
    model = Backbone(CONFIG)
    with pytest.raises(ValueError, match="state has 2 entries, expected one a block: 5"):
        model.init(jax.random.key(0), X, state=model.initial_state(2)[:2])
