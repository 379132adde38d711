"""Recurrences and short convolutions whose length is split: equal to the whole row, shard by shard.

Decays are slow, so that what leaks from another document, or is lost on the way, shows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels as kernels
from pallas_kernels.tools import aot, testing
from seqmodels import ops
from seqmodels.parallel import (
    STRATEGIES,
    batch_sharding,
    make_mesh,
    on_mesh,
    replicated,
    token_sharding,
)
from seqmodels.parallel.strategies import MANY, choosing, strategy_of
from seqmodels.segments import Segments
from tests.seqmodels.parallel.hlo import collectives
from tests.tiers import one_of_many

LENGTH = 24
# The lengths of each row's documents. Shards begin at multiples of 12, of 8 and of 3: documents
# begin there and one token to either side, go over one, two or all shards, and end in padding
# that fills whole shards.
ROWS = [
    (24,),
    (12, 12),
    (11, 13),
    (13, 11),
    (8, 8, 8),
    (7, 10, 7),
    (9, 6, 9),
    (3, 3, 1, 2, 15),
    (1,) * 24,
    (10,),
    (8, 4),
    (2, 1),
    (23,),
    (),
]
BATCH = len(ROWS)


def segment_ids():
    rows = [np.repeat(np.arange(len(sizes)) % 2 + 1, sizes) for sizes in ROWS]
    return np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows]).astype(np.int32)


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def tokens(*shape):
    return normal(BATCH, LENGTH, *shape)


def slow(*shape):
    """Log decays around -0.01."""
    return -0.02 * np.random.default_rng(sum(shape)).random(shape)


def keys():
    k = tokens(1, 4)
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


HEADS = {"q": tokens(1, 4), "k": keys(), "v": tokens(2, 3), "initial_state": normal(BATCH, 2, 4, 3)}
BETA = {"beta": 1 / (1 + np.exp(-tokens(2)))}
MODES = {"log_a": slow(3, 2) + 1j * normal(3, 2), "c": normal(3, 2) + 1j * normal(2, 3).T}
MODES["initial_state"] = normal(BATCH, 3, 2) + 1j * normal(BATCH, 2, 3).transpose(0, 2, 1)
CASES = {
    "linear_scan": {
        "a": np.exp(slow(BATCH, LENGTH, 4)), "b": tokens(4), "initial_state": normal(BATCH, 4),
    },
    "linear_scan, one decay": {
        "a": np.exp(slow(4)), "b": tokens(4), "initial_state": normal(BATCH, 4),
    },
    "linear_scan, reverse": {
        "a": np.exp(slow(BATCH, LENGTH, 4)), "b": tokens(4), "initial_state": normal(BATCH, 4),
    },
    "selective_scan": {
        "x": tokens(4), "dt": 0.2 + 0.1 * tokens(4) ** 2, "A": slow(4, 3) * 5, "B": tokens(3),
        "C": tokens(3), "D": normal(4), "gate": tokens(4) / 3, "dt_bias": normal(4) ** 2 / 9,
        "initial_state": normal(BATCH, 4, 3),
    },
    "diagonal_ssm": {"u": tokens(3), **MODES},
    "diagonal_ssm, reverse": {"u": tokens(3), **MODES},
    "linear_attention": HEADS,
    "linear_attention, constant": {**HEADS, "log_decay": slow(2)},
    "linear_attention, head": {**HEADS, "log_decay": slow(BATCH, LENGTH, 2)},
    "linear_attention, key": {**HEADS, "log_decay": slow(BATCH, LENGTH, 2, 4)},
    "delta_rule": {**HEADS, **BETA},
    "delta_rule, key": {**HEADS, **BETA, "log_decay": slow(BATCH, LENGTH, 2, 4)},
    "causal_conv1d": {
        "x": tokens(4), "weight": normal(5, 4), "bias": normal(4),
        "initial_state": normal(BATCH, 4, 4),
    },
}  # fmt: skip
SHARED = {"A", "D", "dt_bias", "log_a", "c", "weight", "bias"}


def options(name):
    return {"reverse": True} if name.endswith("reverse") else {}


@functools.cache
def whole(name, packed):
    """Outputs and gradients of the reference in float64, on one device."""
    op = getattr(kernels, name.partition(",")[0])
    with jax.enable_x64(True):
        data = {"segment_ids": segment_ids()} if packed else {}
        arguments = {key: jnp.asarray(x) for key, x in CASES[name].items()}
        cotangents = jax.tree.map(jnp.asarray, cotangents_of(name))
        run = testing.oracle(op, implementation="reference", **options(name))
        return jax.tree.map(np.asarray, run(arguments, data, cotangents))


def cotangents_of(name):
    arrays = CASES[name]
    output = arrays.get("v", arrays.get("b", arrays.get("x", arrays.get("u"))))
    return normal(*output.shape) + 0.1, arrays["initial_state"] * 0.3 + 0.1


def narrow(x):
    return jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32)


def placed(mesh, name, x):
    if name in SHARED or x.ndim == 1:
        return jax.device_put(x, replicated(mesh))
    whole_row = name == "initial_state"
    return jax.device_put(x, batch_sharding(mesh) if whole_row else token_sharding(mesh))


def mesh_of(shards, model=1):
    data = 1 if shards == 8 else 2
    return make_mesh(data, model, shards, devices=jax.devices()[: data * model * shards])


def sharded(name, mesh, packed, exchange=None, implementation=None):
    """``run(arguments, ids, cotangents)``, jitted."""
    op = functools.partial(getattr(ops, name.partition(",")[0]), **options(name))
    op = functools.partial(op, implementation=implementation)

    def run(arguments, ids, cotangents):
        segments = Segments.from_ids(ids) if packed else None
        outputs, pullback = jax.vjp(lambda x: op(**x, segments=segments), arguments)
        return {"outputs": outputs, "gradients": pullback(cotangents)[0]}

    return jax.jit(on_mesh(run, mesh, exchange))


def arguments_on(mesh, name):
    arrays = {key: placed(mesh, key, narrow(x)) for key, x in CASES[name].items()}
    output, state = cotangents_of(name)
    cotangents = placed(mesh, "x", narrow(output)), placed(mesh, "initial_state", narrow(state))
    return arrays, placed(mesh, "x", jnp.asarray(segment_ids())), cotangents


def pieces(name, tree, shards):
    """The leaves by name, with those that have a length cut into shards."""
    (y, final), gradients = tree["outputs"], tree["gradients"]
    cut = {"output": y, **{k: x for k, x in gradients.items() if x.ndim > 1 and k not in SHARED}}
    kept = {"final_state": final, "initial_state": cut.pop("initial_state")}
    kept |= {key: x for key, x in gradients.items() if key not in cut and key not in kept}
    parts = {k: np.split(np.asarray(x), shards, axis=1) for k, x in cut.items()}
    return kept | {f"{k} of shard {r}": x for k, each in parts.items() for r, x in enumerate(each)}


def check(name, shards, packed, exchange=None, implementation=None, model=1):
    mesh = mesh_of(shards, model)
    run = sharded(name, mesh, packed, exchange, implementation)
    actual = run(*arguments_on(mesh, name))
    output = actual["outputs"][0]
    split = model > 1 and output.shape[2] % model == 0
    expected = NamedSharding(mesh, PartitionSpec("data", "seq", "model" if split else None))
    assert output.sharding.is_equivalent_to(expected, output.ndim)
    expected = whole(name, packed)
    testing.assert_close(
        pieces(name, actual, shards), pieces(name, expected, shards), testing.FLOAT32_TOLERANCE
    )


EVERY = [
    (name, shards, packed, None) for name in CASES for shards in (1, 2, 3, 8) for packed in (1, 0)
]
# The reference, token by token, compiles in a third of the time; the exchange is the same.
ALWAYS = [
    ("linear_scan", 3, 1, None),
    ("linear_scan, reverse", 8, 1, None),
    ("selective_scan", 3, 1, "reference"),
    ("diagonal_ssm, reverse", 3, 1, "reference"),
    ("linear_attention, key", 8, 1, None),
    ("linear_attention, constant", 3, 0, None),
    ("delta_rule, key", 3, 1, "reference"),
    ("causal_conv1d", 8, 1, None),
    ("causal_conv1d", 3, 0, None),
]


@pytest.mark.full(
    "linear_scan, reverse-8-1-None", "causal_conv1d-8-1-None", "linear_attention, constant-3-0-None"
)
@pytest.mark.parametrize(
    ("name", "shards", "packed", "implementation"),
    one_of_many(dict.fromkeys([*ALWAYS, *EVERY]), ALWAYS),
)
def test_shards_equal_the_whole_row(name, shards, packed, implementation):
    check(name, shards, bool(packed), implementation=implementation)


@pytest.mark.full
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_heads_and_channels_over_a_model_axis_change_nothing(name, packed):
    """Three channels over two devices too, which both have all of them."""
    check(name, 2, packed, model=2)


OTHERS = [
    (name, strategy)
    for name in ("linear_scan", "selective_scan", "diagonal_ssm", "delta_rule")
    for strategy in STRATEGIES[name][1:]
] + [("linear_attention, key", strategy) for strategy in STRATEGIES["linear_attention"][1:]]


@pytest.mark.parametrize(("name", "strategy"), one_of_many(OTHERS, [("linear_scan", "chain")]))
def test_every_strategy_gives_the_same(name, strategy):
    check(name, 3, True, {name.partition(",")[0]: strategy})


@pytest.mark.always("linear_attention, head")
@pytest.mark.parametrize("name", one_of_many(CASES, ["linear_attention, head", "causal_conv1d"]))
def test_what_another_document_holds_changes_no_bit(name):
    mesh = mesh_of(3)
    run = sharded(name, mesh, packed=True)
    arrays, ids, cotangents = arguments_on(mesh, name)
    varied = {k for k, x in arrays.items() if x.ndim > 1 and k not in {*SHARED, "initial_state"}}
    values = varied & {"b", "x", "u", "v"}
    other = (ids == 1)[:, :, None]

    def foreign(x):
        mask = other.reshape(*other.shape[:2], *(1,) * (x.ndim - 2))
        return jnp.where(mask, x * 1e30, x)

    changed = arrays | {key: foreign(arrays[key]) for key in values}
    own = np.asarray(ids) == 2
    one, two = (run(x, ids, cotangents) for x in (arrays, changed))
    np.testing.assert_array_equal(one["outputs"][0][own], two["outputs"][0][own])
    for key in varied:
        np.testing.assert_array_equal(
            np.asarray(one["gradients"][key])[own], np.asarray(two["gradients"][key])[own], key
        )


# Forward: the documents, and what enters. With all gradients: the latter once more, and in one sum
# each the final state, and what devices add to the gradients of arrays that are not split. Of the
# convolution: the window, and back.
MOVED = {
    "linear_attention, head": ({"all-gather": 2}, {"all-gather": 3, "all-reduce": 1}),
    "delta_rule": (
        {"all-gather": 1, "collective-permute": 2},
        {"all-gather": 1, "collective-permute": 4, "all-reduce": 1},
    ),
    "causal_conv1d": (
        {"all-gather": 1, "collective-permute": 1},
        {"all-gather": 1, "collective-permute": 2, "all-reduce": 3},
    ),
}


@pytest.mark.always("causal_conv1d", "delta_rule")
@pytest.mark.parametrize("name", MOVED)
def test_so_much_moves_whatever_the_length(name):
    mesh = mesh_of(3)

    def doubled(key, x):
        if key in SHARED or key == "initial_state":
            return x
        return jax.device_put(jnp.concatenate([x, x], axis=1), token_sharding(mesh))

    arrays, ids, (output, final) = arguments_on(mesh, name)
    twice = {key: doubled(key, x) for key, x in arrays.items()}, doubled("ids", ids)
    op = functools.partial(getattr(ops, name.partition(",")[0]), implementation="reference")
    forward = jax.jit(
        on_mesh(lambda arrays, ids: op(**arrays, segments=Segments.from_ids(ids))[0], mesh)
    )
    both = sharded(name, mesh, packed=True, implementation="reference")
    for function, cotangents, expected in (
        (forward, ((), ()), MOVED[name][0]),
        (both, (((output, final),), ((doubled("y", output), final),)), MOVED[name][1]),
    ):
        moved = collectives(function, arrays, ids, *cotangents[0])
        assert {kind: count for kind, (count, _) in moved.items()} == expected
        assert collectives(function, *twice, *cotangents[1]) == moved


def test_documents_are_numbered_along_the_whole_row():
    ids = segment_ids()
    expected = Segments.from_ids(ids)
    for shards in (3, 8):
        mesh = mesh_of(shards)

        def numbered(ids):
            segments = Segments.from_ids(ids)
            return segments.index, segments.positions

        index, positions = jax.jit(on_mesh(numbered, mesh))(placed(mesh, "ids", jnp.asarray(ids)))
        np.testing.assert_array_equal(index, expected.index)
        np.testing.assert_array_equal(positions, expected.positions)


def test_explain_tells_the_exchange():
    b = jnp.ones((2, 12, 4))
    scan = on_mesh(lambda: ops.linear_scan(b, b), mesh_of(3), {"linear_scan": "chain"})
    told = {(c.op, c.implementation) for c in kernels.explain(scan)}
    assert ("linear_scan over 3 shards", "chain") in told


def test_many_shards_do_not_gather_all_states():
    assert strategy_of("linear_scan", MANY) == "all_gather"
    assert strategy_of("linear_scan", MANY + 1) == "doubling"
    assert strategy_of("attention", MANY + 1) == "gather"
    with choosing({"linear_scan": "all_gather"}):
        assert strategy_of("linear_scan", MANY + 1) == "all_gather"


def test_lengths_and_strategies_that_do_not_fit_are_refused():
    mesh = mesh_of(3)
    b = jnp.ones((2, 10, 4))
    with pytest.raises(ValueError, match=r"length of 10 .* seq axis of 3; pad rows to 12"):
        on_mesh(lambda: ops.linear_scan(b, b), mesh)()
    with pytest.raises(ValueError, match=r"delta_rule cannot take 'ring'; .*doubling, chain"):
        on_mesh(lambda: None, mesh, {"delta_rule": "ring"})
    with pytest.raises(ValueError, match=r"op 'attend' is not one of linear_scan"):
        on_mesh(lambda: None, mesh, {"attend": "ring"})


@pytest.mark.full
def test_tpu_kernels_compile_for_a_row_over_four_chips():
    mesh = make_mesh(1, seq=4, devices=aot.topology("v5e").devices)

    def loss(q, k, v, log_decay, initial_state, ids):
        arrays = {"log_decay": log_decay, "initial_state": initial_state}
        return jnp.sum(ops.linear_attention(q, k, v, **arrays, segments=Segments.from_ids(ids))[0])

    def struct(sharding, dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh))

    heads = struct(token_sharding, jnp.float32, 1, 1024, 2, 128)
    arguments = (
        *(heads, heads, heads),
        struct(token_sharding, jnp.float32, 1, 1024, 2),
        struct(batch_sharding, jnp.float32, 1, 2, 128, 128),
        struct(token_sharding, jnp.int32, 1, 1024),
    )
    program = jax.jit(on_mesh(jax.grad(loss, (0, 1, 2, 3)), mesh)).lower(*arguments).compile()
    # Once over the tokens, forward and backward.
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2
