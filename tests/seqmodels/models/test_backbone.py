"""Backbone: layout, scanning over layers, state, labels of parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import aot, testing
from seqmodels.mixers import HGRN2Config, LightningConfig, S4DConfig, S5Config, Segments
from seqmodels.mixers.lightning import slopes
from seqmodels.models import Backbone, BackboneConfig, param_labels, stack_layers, unstack_layers
from tests import tolerances
from tests.pallas_kernels.absent import needs_compiler
from tests.tiers import one_of_many

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
X = jnp.asarray(np.random.default_rng(2).standard_normal((2, 6, 4)).astype(np.float32))
SEGMENTS = jax.jit(Segments.from_ids)(np.array([[1, 1, 2, 2, 2, 0], [1] * 6], np.int32))


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


@pytest.mark.full
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
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_MODEL), one, two
        )


def test_layers_of_a_scan_start_different():
    config = dataclasses.replace(CONFIG, layout=("s5",) * 2, mixers=(S5_SMALL,), scan_layers=True)
    kernel = init(config)["params"]["period"]["block_0"]["gate"]["gate"]["kernel"]
    assert kernel.shape == (2, 4, 4)
    assert np.any(kernel[0] != kernel[1])


@pytest.mark.parametrize("remat", one_of_many(["dots", "full", "offload"], ["dots"]))
def test_remat_changes_no_gradient(remat):
    config = dataclasses.replace(CONFIG, layout=("s5",), mixers=(S5_SMALL,), norm="layer")
    params = init(config)["params"]

    def gradient(config):
        loss = lambda p: jnp.sum(jnp.sin(Backbone(config).apply({"params": p}, X)[0]))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_LAYERS),
        gradient(dataclasses.replace(config, remat=remat)),
        gradient(config),
    )


@pytest.mark.parametrize("scan_layers", one_of_many([True, False], [False]))
def test_tiles_of_an_mlp_change_no_gradient(scan_layers):
    """Tiles that do not divide the length."""
    config = BackboneConfig(
        layout=("s5",) * (1 + scan_layers),
        mixers=(S5_SMALL,),
        width=4,
        mlp=6,
        mlp_kind="swiglu",
        scan_layers=scan_layers,
    )
    params = init(config)["params"]

    def gradient(tile):
        stack = Backbone(dataclasses.replace(config, mlp_tile=tile))
        shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), X))["params"]
        assert jax.tree.structure(shapes) == jax.tree.structure(params)
        loss = lambda p, x: jnp.sum(jnp.sin(stack.apply({"params": p}, x)[0]))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, X)

    testing.assert_close(gradient(2), gradient(None), tolerances.FLOAT32_MIXER_GRADIENTS)


@pytest.mark.parametrize(
    ("layout", "merged"), [(("s5", "s4d") * 2, False), (("s5", "s4d", "s4d"), True)]
)
def test_what_is_computed_again_outside_of_a_loop_is_not_merged_with_what_was(layout, merged):
    """Layouts that repeat nothing are unrolled, whatever ``scan_layers`` says."""
    config = dataclasses.replace(CONFIG, layout=layout, scan_layers=True, remat="full")
    params = init(config)
    program = str(jax.make_jaxpr(Backbone(config).apply)(params, X))
    assert f"prevent_cse={merged}" in program
    assert f"prevent_cse={not merged}" not in program


@pytest.mark.full
def test_the_residual_stream_waits_in_the_hosts_memory():
    needs_compiler("v5e")
    config = dataclasses.replace(
        CONFIG, layout=("s5",) * 4, mixers=(S5_SMALL,), norm="layer", scan_layers=True
    )
    x = jax.ShapeDtypeStruct((1, 1024, 4), jnp.float32)

    def program(remat):
        stack = Backbone(dataclasses.replace(config, remat=remat))
        params = jax.eval_shape(lambda: stack.init(jax.random.key(0), jnp.zeros((1, 8, 4))))
        grad = jax.grad(lambda p, x: jnp.sum(jnp.sin(stack.apply(p, x)[0])))
        return aot.compile_for("v5e", grad, params, x)

    full, offload = program("full"), program("offload")
    host = "S(5)"  # XLA's memory space of the host
    assert host not in full.as_text()
    assert offload.as_text().count(host) >= 2  # there and back
    moved = offload.memory_analysis().host_temp_size_in_bytes
    assert moved >= 4 * 1024 * 4 * 4


@pytest.mark.parametrize("prenorm", [True, False])
def test_block_order(prenorm):
    config = BackboneConfig(
        layout=("s5",), mixers=(S5_SMALL,), width=4, norm="layer", prenorm=prenorm
    )
    y = np.asarray(jax.jit(Backbone(config).apply)(init(config), X)[0])
    normalised = np.allclose(y.mean(-1), 0, **tolerances.EACH_FLOAT32_OUTPUT) and np.allclose(
        y.var(-1), 1, atol=1e-3
    )
    assert normalised != prenorm


@pytest.mark.always("swiglu-True", "geglu-False", "gelu-True")
@pytest.mark.parametrize("mlp_bias", [True, False])
@pytest.mark.parametrize("mlp_kind", ["gelu", "swiglu", "geglu"])
def test_mlp_kinds(mlp_kind, mlp_bias):
    config = dataclasses.replace(
        CONFIG, layout=("s5",), mixers=(S5_SMALL,), norm="rms", gate=None, final_norm=False,
        mlp_kind=mlp_kind, mlp_bias=mlp_bias,
    )  # fmt: skip
    params = jax.device_get(init(config)["params"]["block_0"])
    names = {name for name in params if name.startswith("mlp_") and name != "mlp_norm"}
    assert names == {"mlp_in", "mlp_out"} | ({"mlp_gate"} if mlp_kind != "gelu" else set())
    assert all(("bias" in params[name]) == mlp_bias for name in names)
    params = jax.tree.map(lambda p: p + np.float32(0.1), params)
    # The mixer sees nothing and gives nothing, so that the block is its MLP.
    params["norm"] = jax.tree.map(np.zeros_like, params["norm"])
    y = jax.jit(Backbone(config).apply)({"params": {"block_0": params}}, X)[0]

    def linear(x, name):
        return x @ params[name]["kernel"] + params[name].get("bias", 0.0)

    x = np.asarray(X, np.float64)
    scale = params["mlp_norm"]["rms"]["scale"]
    normed = scale * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    gelu = lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # noqa: E731
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    hidden = linear(normed, "mlp_in")
    if mlp_kind == "gelu":
        hidden = gelu(hidden)
    else:
        hidden = hidden * (gelu if mlp_kind == "geglu" else silu)(linear(normed, "mlp_gate"))
    np.testing.assert_allclose(y, x + linear(hidden, "mlp_out"), **tolerances.EACH_FLOAT32_LAYERS)


@pytest.mark.full
def test_a_float32_residual_adds_up_small_branches():
    small = dataclasses.replace(CONFIG, layout=("s5",) * 2, mixers=(S5_SMALL,), norm="rms")
    small = dataclasses.replace(small, mlp_kind="swiglu", final_norm=False, gate=None)
    variables = jax.tree.map(lambda p: 0.1 * p, init(small))
    seen = {}
    for kept in (False, True):
        model = Backbone(dataclasses.replace(small, float32_residual=kept))
        x = 256 * X.astype(jnp.bfloat16)
        (y, _), sown = jax.jit(
            lambda x, m=model: m.apply(variables, x, capture_intermediates=True)
        )(x)
        inner = sown["intermediates"]["block_0"]
        assert y.dtype == jnp.bfloat16
        assert inner["mlp_out"]["__call__"][0].dtype == jnp.bfloat16
        seen[kept] = inner["__call__"][0][0]
    assert (seen[False].dtype, seen[True].dtype) == (jnp.bfloat16, jnp.float32)
    # What a branch adds is below the rounding of the stream: only float32 keeps it.
    assert np.any(np.asarray(seen[True]) != np.asarray(seen[True].astype(jnp.bfloat16)))


def test_chunks_with_carried_state_equal_the_whole():
    config = dataclasses.replace(CONFIG, layout=("s5", "s4d"), norm="rms")
    model, variables = Backbone(config), init(config)
    whole, state = jax.jit(model.apply)(variables, X)
    run = jax.jit(lambda x, s: model.apply(variables, x, state=s))
    first, carried = run(X[:, :4], model.initial_state(2))
    second, carried = run(X[:, 4:], carried)
    pieces = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(pieces, whole, **tolerances.EACH_FLOAT32_MODEL)
    assert jax.tree.structure(carried) == jax.tree.structure(state)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_marks(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers, decay_vectors=False)
    params = abstract(config)["params"]
    tree = param_labels(config, {"backbone": params})["backbone"]
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    blocks = tree["period"] if scan_layers else tree
    s5, s4d = blocks["block_0"], blocks["block_1"]
    assert s5["mixer"]["Lambda_re"] == S5_SMALL.param_labels()["Lambda_re"]
    assert s4d["mixer"]["log_dt"] == S4D_SMALL.param_labels()["log_dt"]
    assert (s5["gate"]["gate"]["kernel"].group, s5["gate"]["gate"]["kernel"].weight_decay) == (
        "main",
        True,
    )
    assert not s5["gate"]["gate"]["bias"].weight_decay
    assert not s5["norm"]["batch"]["scale"].weight_decay
    assert s5["norm"]["batch"]["scale"].float32
    assert tree["final_norm"]["batch"]["bias"].float32
    decayed = param_labels(dataclasses.replace(config, decay_vectors=True), params)
    assert decayed["final_norm"]["batch"]["bias"].weight_decay


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": ("s5", "mamba")}, "layout=.*must name every config"),
        ({"layout": ()}, "layout=.*must name every config"),
        ({"mixers": (S5_SMALL, S5_SMALL, S4D_SMALL)}, "one config a name"),
        ({"width": 0}, "width=0 must be positive"),
        ({"mlp": 0}, "mlp=0 must be positive.* or None"),
        ({"norm_epsilon": 0.0}, "norm_epsilon=0.0 must be positive and finite or None"),
        ({"float32_residual": True, "prenorm": False}, "float32_residual=True needs prenorm=True"),
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


@pytest.mark.parametrize("mixer", [LightningConfig(heads=2, head_size=2), HGRN2Config(head_size=2)])
def test_mixers_that_differ_by_depth_are_told_it(mixer):
    config = BackboneConfig((mixer.mixer,) * 3, (mixer,), width=4, scan_layers=True)
    assert [config.mixer(i).layer for i in range(3)] == [0, 1, 2]
    assert config.mixer(0).layers == 3
    # They do not repeat, so they are not scanned over.
    assert (config.period, config.repeats) == (3, 0)


def test_lightning_decays_less_in_deeper_layers():
    mixer = LightningConfig(heads=2, head_size=2)
    config = BackboneConfig(("lightning",) * 2, (mixer,), width=4)
    first, last = (slopes(2, config.mixer(i).layer, config.mixer(i).layers) for i in range(2))
    np.testing.assert_allclose(last / first, 1e-5 / (1 + 1e-5), **tolerances.EACH_FLOAT32_TOTAL)


def test_blocks_of_one_branch():
    config = BackboneConfig(
        layout=("s5", "mlp") * 2, mixers=(S5_SMALL,), width=4, single=True, mlp=6,
        mlp_kind="relu2", mlp_bias=False, norm="rms", scan_layers=True,
    )  # fmt: skip
    assert (config.period, config.repeats) == (2, 2)
    unrolled = dataclasses.replace(config, scan_layers=False)
    params = jax.device_get(init(unrolled)["params"])
    assert {*params["block_1"]} == {"mlp_norm", "mlp_in", "mlp_out"}
    assert {*params["block_2"]} == {"norm", "mixer"}
    start = Backbone(unrolled).initial_state(2)
    assert [state is None for state in start] == [False, True] * 2
    y, state = jax.jit(Backbone(unrolled).apply)(
        {"params": params}, X, segments=SEGMENTS, state=start
    )
    again, scanned = jax.jit(Backbone(config).apply)(
        {"params": stack_layers(config, params)}, X, segments=SEGMENTS, state=start
    )
    assert jax.tree.structure(state) == jax.tree.structure(scanned) == jax.tree.structure(start)
    np.testing.assert_allclose(y, again, **tolerances.EACH_FLOAT32_MODEL)
    one = jax.tree.map(np.zeros_like, params["block_1"]["mlp_out"])
    same = {**params, "block_1": {**params["block_1"], "mlp_out": one}}
    same["block_3"] = {**params["block_3"], "mlp_out": one}
    alone = dataclasses.replace(config, layout=("s5",) * 2, single=False, mlp=None)
    mixers = {"block_0": params["block_0"], "block_1": params["block_2"]}
    alone = dataclasses.replace(alone, scan_layers=False)
    np.testing.assert_array_equal(
        jax.jit(Backbone(unrolled).apply)({"params": same}, X)[0],
        jax.jit(Backbone(alone).apply)({"params": mixers}, X)[0],
    )
    with pytest.raises(ValueError, match="must name every config in mixers"):
        dataclasses.replace(config, single=False)
