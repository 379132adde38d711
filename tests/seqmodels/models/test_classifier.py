"""Classifier: padding, pooling, training variables, and the configs' JSON round trip."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tools import testing
from seqmodels.config import from_dict, to_dict
from seqmodels.layers.embedding import sinusoids
from seqmodels.mixers import AttentionConfig, S4DConfig, S5Config, Segments
from seqmodels.models import (
    Backbone,
    BackboneConfig,
    Classifier,
    ClassifierConfig,
    Matcher,
    MatcherConfig,
    param_labels,
)
from seqmodels.models.classifier import pool
from seqmodels.parallel.mesh import make_mesh, put_batch
from seqmodels.training.config import TrainConfig
from seqmodels.training.state import create_state, optimizer_of
from seqmodels.training.step import make_train_step
from seqmodels.training.task import classification
from tests import tolerances
from tests.tiers import one_of_many

CONFIG = ClassifierConfig(
    backbone=BackboneConfig(
        layout=("s5",),
        mixers=(S5Config(state_size=4, blocks=2, bidirectional=True),),
        width=8,
        norm="batch",
        gate="half_glu2",
        dropout=0.3,
    ),
    num_classes=3,
    vocabulary_size=11,
)
LENGTHS = np.array([[7], [3], [0]])
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 7)).astype(np.int32)
IDS = (np.arange(7)[None] < LENGTHS).astype(np.int32)


@functools.cache
def init(config=CONFIG):
    return jax.jit(Classifier(config).init)(jax.random.key(0), TOKENS, IDS)


def test_logits_ignore_padding():
    model, variables = Classifier(CONFIG), init()
    apply = jax.jit(model.apply)
    logits = apply(variables, TOKENS, IDS)
    assert (logits.shape, logits.dtype) == ((3, 3), jnp.float32)
    np.testing.assert_array_equal(apply(variables, np.where(IDS, TOKENS, 5), IDS), logits)
    alone = apply(variables, TOKENS[1:2, :3])
    np.testing.assert_allclose(alone[0], logits[1], **tolerances.EACH_FLOAT32_LAYERS)
    assert np.all(np.isfinite(logits))


def test_training_updates_statistics_and_draws_dropout():
    model, variables = Classifier(CONFIG), init()

    @jax.jit
    def step(key):
        return model.apply(
            variables,
            TOKENS,
            IDS,
            deterministic=False,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )

    one, updates = step(jax.random.key(0))
    two, _ = step(jax.random.key(1))
    assert np.any(one != two)
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(model.apply(variables | {"params": params}, TOKENS, IDS) ** 2)

    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(variables["params"]))[0]:
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != 0), path


def test_embedding_starts_like_a_linear_layer_on_one_hot_tokens():
    wide = dataclasses.replace(CONFIG.backbone, width=256)
    config = dataclasses.replace(CONFIG, backbone=wide)
    table = init(config)["params"]["encoder"]["embedding"]
    np.testing.assert_allclose(np.std(table), 11**-0.5, rtol=0.1)
    table = init(dataclasses.replace(config, embedding_std=1.0))["params"]["encoder"]["embedding"]
    np.testing.assert_allclose(np.std(table), 1.0, rtol=0.1)


def test_pooling():
    x = jax.random.normal(jax.random.key(0), (3, 7, 2))
    segments = Segments.from_ids(IDS, single=True)
    mean, last = (np.asarray(pool(x, segments, kind)) for kind in ("mean", "last"))
    np.testing.assert_allclose(mean[1], np.asarray(x)[1, :3].mean(0), **tolerances.EACH_FLOAT32_SUM)
    np.testing.assert_array_equal(last[:2], np.stack([x[0, 6], x[1, 2]]))
    assert not np.any(mean[2])
    assert not np.any(last[2])
    np.testing.assert_allclose(
        pool(x, None, "mean"), np.mean(x, 1), **tolerances.EACH_FLOAT32_TERMS_OF_ONE
    )
    np.testing.assert_array_equal(pool(x, None, "last"), x[:, -1])


def test_real_valued_inputs():
    config = dataclasses.replace(CONFIG, vocabulary_size=None)
    x = jax.random.normal(jax.random.key(0), (3, 7, 2))
    model = Classifier(config)
    variables = jax.jit(model.init)(jax.random.key(0), x, IDS)
    assert variables["params"]["encoder"]["kernel"].shape == (2, 8)
    assert jax.eval_shape(model.apply, variables, x, IDS).shape == (3, 3)
    with pytest.raises(ValueError, match="vocabulary_size=None the classifier takes real values"):
        model.apply(variables, TOKENS, IDS)
    with pytest.raises(ValueError, match="vocabulary_size=11 the classifier takes integer ids"):
        Classifier(CONFIG).apply(init(), x, IDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_classes": 1}, "num_classes=1"), ({"vocabulary_size": 0}, "vocabulary_size=0")],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@dataclasses.dataclass(frozen=True)
class Small:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Large:
    size: int = 2
    rates: tuple[float, float] = (0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Outer:
    part: Small | Large
    table: dict[str, Small]
    names: tuple[str, ...] = ()
    rate: float | None = None


MIXED = BackboneConfig(
    layout=("s4d", "s5"), mixers=(S4DConfig(n_ssm=1), S5Config(decay="noBCdecay")), width=4, mlp=3
)
OUTER = Outer(Large(rates=(0.5, 1.0)), {"a": Small(4)}, ("x", "y"), 0.25)


@pytest.mark.parametrize("config", [CONFIG, MIXED, OUTER, Outer(Small(), {})])
def test_configs_survive_json(config):
    text = json.dumps(to_dict(config))
    assert from_dict(type(config), json.loads(text)) == config


def test_absent_keys_take_their_defaults_and_integers_become_floats():
    data = {"part": {"type": "Large", "rates": [1, 2]}, "table": {}}
    outer = from_dict(Outer, data)
    assert outer == Outer(Large(rates=(1.0, 2.0)), {})
    assert isinstance(outer.part.rates[0], float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"wdth": 4},
            "BackboneConfig: unknown key 'wdth'; BackboneConfig has layout, mixers, width",
        ),
        ({"width": "4"}, "BackboneConfig.width='4' must be an integer"),
        ({"width": True}, "BackboneConfig.width=True must be an integer"),
        ({"norm": "group"}, "BackboneConfig.norm='group' is not one of 'batch', 'layer', 'rms'"),
        ({"layout": "s5"}, "BackboneConfig.layout='s5' must be a list"),
        (
            {"mixers": [{"mixer": "s6"}]},
            r"mixers\[0\]: mixer='s6' is not registered; known: .*s4d, s5",
        ),
        (
            {"mixers": [{"mixer": "s5", "order": 2}]},
            r"mixers\[0\]: unknown key 'order'; S5Config has",
        ),
        ({"mixers": [3]}, r"mixers\[0\]: expected the fields of MixerConfig, got 3"),
    ],
)
def test_bad_dicts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(BackboneConfig, to_dict(MIXED) | change)


def test_missing_keys_and_wrong_choices_are_refused():
    with pytest.raises(ValueError, match="BackboneConfig: missing key 'layout', 'mixers'"):
        from_dict(BackboneConfig, {"width": 4})
    with pytest.raises(ValueError, match=r"Outer.part: type='Huge' is not one of Small, Large"):
        from_dict(Outer, {"part": {"type": "Huge"}, "table": {}})
    with pytest.raises(ValueError, match=r"Outer.part.rates=\[1.0\] must have 2 entries"):
        from_dict(Outer, {"part": {"type": "Large", "rates": [1.0]}, "table": {}})
    with pytest.raises(ValueError, match="mixer='s4d' is a S4DConfig, not a S5Config"):
        from_dict(S5Config, {"mixer": "s4d"})


CLASS = dataclasses.replace(CONFIG, pooling="class")


def test_class_token_sees_the_whole_row_and_no_padding():
    variables = init(CLASS)
    assert variables["params"]["class_token"].shape == (8,)
    apply = jax.jit(Classifier(CLASS).apply)
    logits = apply(variables, TOKENS, IDS)
    np.testing.assert_array_equal(apply(variables, np.where(IDS, TOKENS, 5), IDS), logits)
    last = TOKENS.copy()
    last[0, -1] = (last[0, -1] + 1) % 11
    changed = np.abs(apply(variables, last, IDS) - logits).max(1)
    assert changed[0] > 1e-6
    np.testing.assert_array_equal(changed[1:], 0.0)


def test_class_token_behind_causal_mixers_is_refused():
    causal = dataclasses.replace(
        CONFIG.backbone,
        mixers=(dataclasses.replace(CONFIG.backbone.mixers[0], bidirectional=False),),
    )
    with pytest.raises(ValueError, match=r"pooling='class' reads the first token.*take 'last'"):
        dataclasses.replace(CLASS, backbone=causal)


@pytest.mark.parametrize("interaction", ["concat", "nli"])
def test_matcher_encodes_both_inputs_with_one_tower(interaction):
    config = MatcherConfig(CONFIG, interaction=interaction, hidden=6)
    assert from_dict(MatcherConfig, json.loads(json.dumps(to_dict(config)))) == config
    model = Matcher(config)
    tokens, ids = (np.stack([x, np.roll(x, 1, axis=0)], axis=1) for x in (TOKENS, IDS))
    variables = jax.jit(model.init)(jax.random.key(0), tokens, ids)
    kernel = variables["params"]["head_in"]["kernel"]
    assert kernel.shape == (8 * (2 if interaction == "concat" else 4), 6)
    apply = jax.jit(model.apply)
    logits = apply(variables, tokens, ids)
    assert (logits.shape, logits.dtype) == ((3, 3), jnp.float32)
    # Padding of either input is not seen; tokens of either are.
    np.testing.assert_array_equal(apply(variables, np.where(ids, tokens, 5), ids), logits)
    for side in range(2):
        other = tokens.copy()
        other[1, side, 0] = (other[1, side, 0] + 1) % 11
        assert np.abs(apply(variables, other, ids)[1] - logits[1]).max() > 1e-6
    # The encodings are a classifier's: its tree is in the matcher's.
    assert set(init()["params"]) - {"head"} < set(variables["params"])
    tree = param_labels(config, variables["params"])
    assert tree["backbone"]["block_0"]["mixer"]["log_step"].group == "ssm"


def test_matcher_names_bad_input():
    with pytest.raises(ValueError, match=r"two sequences a row, \(B, 2, L\)"):
        Matcher(MatcherConfig(CONFIG)).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="hidden=0 must be positive"):
        MatcherConfig(CONFIG, hidden=0)


@pytest.mark.parametrize("wrong", [-1, 11])
def test_known_ids_outside_of_the_vocabulary_are_refused(wrong):
    tokens = np.full((1, 2, 3), wrong, np.int32)
    models = (Classifier(CONFIG), tokens[0]), (Matcher(MatcherConfig(CONFIG)), tokens)
    for model, inputs in models:
        with pytest.raises(ValueError, match=rf"inputs hold the id {wrong}.*vocabulary_size=11"):
            jax.eval_shape(lambda m=model, x=inputs: m.init(jax.random.key(0), x))


@pytest.mark.full
@pytest.mark.parametrize("parts", one_of_many([1, 2], [2]))
def test_a_step_is_the_same_with_64_bit_types(parts):
    """A classifier and a matcher; with dropout, batch statistics and two learning rates."""
    config = CONFIG if parts == 1 else MatcherConfig(CONFIG, hidden=6)
    model = Classifier(config) if parts == 1 else Matcher(config)
    tokens, ids = TOKENS, np.maximum(IDS, IDS[:1])
    if parts == 2:
        tokens, ids = (np.stack([x, np.roll(x, 1, axis=0)], axis=1) for x in (tokens, ids))
    batch = {
        "inputs": tokens,
        "segment_ids": ids,
        "labels": np.array([0, 2, 1], np.int32),
        "weights": np.ones(3, np.float32),
    }
    # An epsilon that hides no rounding: Adam divides a gradient by its own size.
    train = TrainConfig(steps=4, batch_size=3, learning_rate=0.05, ema_decay=0.9, adam_eps=1e-2)

    def run():
        mesh = make_mesh(devices=jax.devices()[:1])
        labels = functools.partial(param_labels, config)
        task = classification(model, labels, length=7, parts=parts)
        state = create_state(task, train, mesh)
        step = make_train_step(task, optimizer_of(task, train), mesh, ema_decay=train.ema_decay)
        state, measured = step(state, put_batch(batch, mesh), np.asarray(True))
        assert bool(measured.finite)
        return jax.device_get((state.replace(rng=jax.random.key_data(state.rng)), measured))

    usual = run()
    with jax.enable_x64(True):
        wide = run()
    assert [x.dtype for x in jax.tree.leaves(wide)] == [x.dtype for x in jax.tree.leaves(usual)]
    testing.assert_close(wide, usual, tolerances.FLOAT32_TRAINED)


def test_sinusoids_are_long_range_arenas():
    table = sinusoids(5, 7)
    assert (table.shape, table.dtype) == ((5, 7), np.float32)
    for t in range(5):
        for i, rate in enumerate((1.0, 1e-2, 1e-4)):
            assert table[t, i] == pytest.approx(np.sin(t * rate), abs=1e-6)
            assert table[t, 3 + i] == pytest.approx(np.cos(t * rate), abs=1e-6)
    assert not table[:, 6].any()


@pytest.mark.full
def test_positions_tell_a_row_from_its_reverse():
    """Attention without any, pooled by the mean, does not."""
    attention = AttentionConfig(heads=1, rotary_base=None, bidirectional=True, init_std=0.5)
    stack = BackboneConfig(("attention",), (attention,), width=8)
    tokens = TOKENS[:1] + np.int32(0)
    for kind, longest, differ in (
        (None, None, False), ("sinusoid", None, True), ("learned", 7, True),
    ):  # fmt: skip
        config = ClassifierConfig(
            stack, num_classes=3, vocabulary_size=11, positions=kind, max_length=longest
        )
        apply = jax.jit(Classifier(config).apply)
        variables = jax.jit(Classifier(config).init)(jax.random.key(0), tokens)
        a, b = apply(variables, tokens), apply(variables, tokens[:, ::-1])
        assert bool(np.max(np.abs(a - b)) > 1e-4) is differ


def test_learned_positions_end():
    config = dataclasses.replace(CONFIG, positions="learned", max_length=6)
    with pytest.raises(ValueError, match=r"rows of 7 tokens.*raise max_length=6"):
        jax.eval_shape(Classifier(config).init, jax.random.key(0), TOKENS, IDS)
    with pytest.raises(ValueError, match="max_length=6 with positions=None"):
        dataclasses.replace(CONFIG, max_length=6)
    with pytest.raises(ValueError, match="max_length=None with positions='learned'"):
        dataclasses.replace(CONFIG, positions="learned")


def test_windows_are_documents_of_their_own():
    """As packed documents of so many tokens, which is another path through every layer."""
    config = dataclasses.replace(CONFIG, window=3)
    model, variables = Classifier(config), init()
    logits = jax.jit(model.apply)(variables, TOKENS, IDS)
    documents = np.where(IDS, 1 + np.arange(7)[None] // 3, 0)

    @jax.jit
    def packed(variables, tokens):
        params = variables["params"]
        x = jnp.asarray(params["encoder"]["embedding"])[tokens]
        within = {name: part["backbone"] for name, part in variables.items()}
        y, _ = Backbone(config.backbone).apply(within, x, segments=Segments.from_ids(documents))
        mean = pool(y, Segments.from_ids(IDS, single=True), "mean")
        return mean @ params["head"]["kernel"] + params["head"]["bias"][None]

    np.testing.assert_allclose(logits, packed(variables, TOKENS), **tolerances.EACH_FLOAT32_LAYERS)
    assert np.abs(logits - jax.jit(Classifier(CONFIG).apply)(variables, TOKENS, IDS)).max() > 1e-3


def test_one_window_is_the_whole_row():
    whole = jax.jit(Classifier(CONFIG).apply)(init(), TOKENS, IDS)
    wide = dataclasses.replace(CONFIG, window=9)
    padded = jax.jit(Classifier(wide).apply)(init(), TOKENS, IDS)
    np.testing.assert_allclose(padded, whole, **tolerances.EACH_FLOAT32_LAYERS)


@pytest.mark.parametrize("pooling", ["last", "class"])
def test_windows_need_the_mean(pooling):
    with pytest.raises(ValueError, match="window=5 needs pooling='mean'"):
        dataclasses.replace(CONFIG, window=5, pooling=pooling)
