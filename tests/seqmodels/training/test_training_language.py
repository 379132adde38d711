"""Language models: states carried between batches, averaged parameters, resume of both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.data import text
from seqmodels.layers.experts import ExpertsConfig
from seqmodels.mixers import (
    AttentionConfig,
    HydraConfig,
    RGLRUConfig,
    S4Config,
    S5Config,
    Segments,
)
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig, param_labels
from seqmodels.parallel.mesh import make_mesh, put_batch
from seqmodels.training.checkpoint import Checkpoints
from seqmodels.training.config import TrainConfig
from seqmodels.training.evaluation import evaluate
from seqmodels.training.language import language
from seqmodels.training.loop import fit
from seqmodels.training.metrics import TIMING_FIELDS, read_jsonl
from seqmodels.training.run_directory import open_run
from seqmodels.training.state import Average, abstract_state, create_state, optimizer_of
from seqmodels.training.step import gradients, make_eval_step, make_train_step
from tests import tolerances
from tests.seqmodels.training.compilation import compiled_once

RNG = np.random.default_rng(0)
TEXT = text.encode([RNG.integers(97, 103, size).astype(np.uint8).tobytes() for size in (20, 300)])
S5, RGLRU = S5Config(state_size=4), RGLRUConfig(heads=2, implementation="reference")
TRUE = np.asarray(True)
CONFIG = TrainConfig(
    steps=6, batch_size=8, learning_rate=0.01, ema_decay=0.8, select="loss", log_every=2,
    eval_every=3, checkpoint_every=2, seed=1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


def model_of(*mixers):
    stack = BackboneConfig(
        layout=tuple(mixer.mixer for mixer in mixers), mixers=mixers, width=6, norm="rms"
    )
    return LanguageModel(LanguageModelConfig(stack, text.VOCABULARY, embedding_std=0.5))


def task_of(*mixers, **options):
    model = model_of(*mixers)
    return language(model, lambda params: param_labels(model.config, params), **options)


CARRYING = task_of(S5, carry_state=True)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def batches_of(length, rows, count, streams=True):
    batches = iter(text.train_batches(TEXT, length=length, batch_size=rows, streams=streams))
    return [next(batches) for _ in range(count)]


def joined(batches):
    return {name: np.concatenate([b[name] for b in batches], axis=1)
            for name in ("inputs", "targets", "segment_ids", "weights")}  # fmt: skip


def test_the_loss_of_pieces_with_carried_states_is_that_of_the_whole():
    mesh, pieces, task = one_device(), batches_of(7, 3, 5), task_of(S5, RGLRU, carry_state=True)
    variables = create_state(task, CONFIG, mesh).variables
    step = make_eval_step(task, mesh)
    in_pieces = evaluate(step, variables, pieces, mesh, task.start)
    whole = evaluate(step, variables, [joined(pieces)], mesh, task.start)
    np.testing.assert_allclose(in_pieces.loss, whole.loss, **tolerances.EACH_FLOAT32_SUM)
    assert (in_pieces.accuracy, in_pieces.examples) == (whole.accuracy, whole.examples)
    forgetful = evaluate(step, variables, pieces[1:], mesh, task.start)
    rest = (whole.loss * 5 - evaluate(step, variables, pieces[:1], mesh, task.start).loss) / 4
    assert abs(forgetful.loss - rest) > 1e-4


@pytest.mark.full
def test_the_gradient_is_that_of_the_last_piece_alone():
    """Truncated backpropagation: the states are constants."""
    first, second = batches_of(7, 3, 2)
    variables = dict(jax.jit(CARRYING.init)(jax.random.key(0)))
    key = jax.random.key(1)

    @jax.jit
    @jax.grad
    def both(params, first, second):
        model = {"params": params}
        state = CARRYING.loss(model, first, key, CARRYING.start(3))[2]
        sums = CARRYING.loss(model, second, key, jax.lax.stop_gradient(state))[0]
        return sums.loss / sums.weight

    expected = both(variables["params"], first, second)
    run = jax.jit(lambda v, batch, carry: gradients(CARRYING, v, batch, key, 1, carry))
    *_, carry = run(variables, first, CARRYING.start(3))
    actual, *_ = run(variables, second, carry)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_STEP),
        actual,
        expected,
    )


@pytest.mark.full
def test_micro_batches_carry_their_own_rows():
    first, second = batches_of(5, 4, 2)
    variables = dict(jax.jit(CARRYING.init)(jax.random.key(0)))
    results = []
    for count in (1, 2):
        run = jax.jit(
            lambda batch, carry, count=count: gradients(
                CARRYING, variables, batch, jax.random.key(1), count, carry
            )
        )
        *_, carry = run(first, CARRYING.start(4))
        results.append(run(second, carry))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_LAYERS), *results
    )


def steps(mesh, count, *, poison=(), task=CARRYING):
    state = create_state(task, CONFIG, mesh)
    step = make_train_step(
        task, optimizer_of(task, CONFIG), mesh, skip_non_finite=True, ema_decay=CONFIG.ema_decay
    )
    states, losses = [jax.device_get(state.replace(rng=0))], []
    for number, batch in enumerate(batches_of(5, 8, count)):
        if number in poison:
            batch["weights"][0, 0] = np.nan
        state, metrics = step(state, put_batch(batch, mesh), TRUE)
        states.append(jax.device_get(state.replace(rng=0)))
        losses.append(float(metrics.sums.loss))
    return states, losses


@pytest.mark.full
def test_eight_devices_equal_one():
    (*_, one), losses = steps(one_device(), 3)
    (*_, eight), others = steps(make_mesh(), 3)
    np.testing.assert_allclose(losses, others, **tolerances.EACH_FLOAT32_SUM)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_DEVICES),
        one.carry,
        eight.carry,
    )


def test_a_skipped_batch_changes_neither_carry_nor_average():
    states, _ = steps(one_device(), 3, poison={1})
    for name in ("carry", "average", "params"):
        before, after = getattr(states[1], name), getattr(states[2], name)
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert states[3].average.updates == 2
    assert states[3].step == 3


def test_the_average_weighs_all_updates_and_nothing_else():
    states, _ = steps(one_device(), 4)
    history = [np.asarray(s.params["embedding"]["embedding"], np.float64) for s in states[1:]]
    shares = 0.8 ** np.arange(3, -1, -1)
    expected = np.einsum("n,nvd->vd", shares / shares.sum(), np.stack(history))
    average = states[-1].averaged["params"]["embedding"]["embedding"]
    np.testing.assert_allclose(average, expected, **tolerances.EACH_FLOAT32_SMALL_TERMS)
    assert not np.allclose(average, history[-1], **tolerances.EACH_FLOAT32_SUM)
    jax.tree.map(np.testing.assert_array_equal, states[0].averaged, states[0].variables)


def test_the_average_of_many_updates_keeps_its_digits():
    update = jax.jit(lambda average, p: average.update(p, 0.9999))
    average = Average({"p": jnp.zeros(())}, jnp.zeros((), jnp.int32))
    values = RNG.uniform(1, 2, 200)
    for value in values:
        average = update(average, {"p": jnp.float32(value)})
    shares = 0.9999 ** np.arange(199, -1, -1)
    np.testing.assert_allclose(
        average.params["p"], shares @ values / shares.sum(), **tolerances.EACH_FLOAT32_SUM
    )


class Stopped(Exception):
    """A test's own fault."""


def train(run_dir, *, resume=False, stop_at=None):
    def on_event(what, step):
        if (what, step) == ("step", stop_at):
            raise Stopped

    return fit(
        CARRYING,
        text.train_batches(TEXT, length=9, batch_size=8, streams=True),
        CONFIG,
        open_run(run_dir, {"train": dataclasses.asdict(CONFIG)}, resume=resume),
        validation=text.eval_batches(TEXT, length=20, batch_size=3, streams=True),
        mesh=one_device(),
        show_progress=False,
        on_event=on_event,
    )


def saved(run_dir, step):
    config_dict = {"train": dataclasses.asdict(CONFIG)}
    template = abstract_state(CARRYING, CONFIG, one_device())
    with Checkpoints(run_dir / "checkpoints", config_dict, read_only=True) as checkpoints:
        state, position = checkpoints.restore(template, step)
    return jax.tree.map(np.asarray, state.replace(rng=0)), position["data"]


@pytest.mark.full
def test_a_broken_run_resumes_bitwise_with_carry_and_average(tmp_path):
    train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "broken", stop_at=5)
    train(tmp_path / "broken", resume=True)
    (state, data), (expected, expected_data) = (
        saved(tmp_path / name, 6) for name in ("broken", "whole")
    )
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert data == expected_data
    assert np.abs(state.carry[0].state).max() > 0
    assert state.average.updates == 6
    records = [
        [{k: v for k, v in record.items() if k not in TIMING_FIELDS}
         for record in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("broken", "whole")
    ]  # fmt: skip
    assert records[0] == records[1]


@pytest.mark.full
def test_validation_uses_the_average_and_the_lowest_loss_is_best(tmp_path):
    outcome = train(tmp_path)
    evaluations = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if r["kind"] == "eval"]
    best = min(evaluations, key=lambda record: record["loss"])
    assert outcome.chosen_step == best["step"]
    state, _ = saved(tmp_path, 6)
    batches = text.eval_batches(TEXT, length=20, batch_size=3, streams=True)
    step = make_eval_step(CARRYING, one_device())
    result = evaluate(step, state.averaged, batches, one_device(), CARRYING.start)
    assert result.loss == evaluations[-1]["loss"]


@pytest.mark.parametrize(
    ("mixers", "options", "message"),
    [
        ((AttentionConfig(heads=1),), {"carry_state": True}, "cache of mixer='attention' grows"),
        ((HydraConfig(head_size=2),), {}, "mixer='hydra' is bidirectional"),
        ((S5Config(bidirectional=True),), {}, "mixer='s5' is bidirectional"),
        ((S4Config(),), {}, "mixer='s4' takes one document a row"),
    ],
)
def test_mixers_that_cannot_are_refused(mixers, options, message):
    with pytest.raises(ValueError, match=message):
        task_of(*mixers, **options)


def test_s4_learns_from_rows_of_one_document():
    task = task_of(S4Config(state_size=4), packed=False)
    (batch,) = batches_of(6, 2, 1)
    variables = dict(jax.jit(task.init)(jax.random.key(0)))
    sums, _, carry = jax.jit(lambda v, b: task.loss(v, b, None, None))(variables, batch)
    assert sums.weight == 12
    assert carry is None


@pytest.mark.full
def test_the_loss_of_a_step_has_the_balance_of_the_experts():
    experts = ExpertsConfig(experts=3, chosen=2, hidden=4)
    stack = BackboneConfig(
        layout=("s5",) * 2, mixers=(S5,), width=6, norm="rms", mlp_kind="swiglu", experts=experts
    )
    model = LanguageModel(LanguageModelConfig(stack, text.VOCABULARY, embedding_std=0.5))
    plain, balanced = (
        language(model, lambda params: param_labels(model.config, params), balance=weight)
        for weight in (0.0, 0.5)
    )
    variables = plain.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, batches_of(12, 2, 1)[0])
    segments = Segments.from_ids(batch["segment_ids"])
    _, sown = model.apply(variables, batch["inputs"], segments=segments, mutable=["losses"])
    expected = np.mean([np.asarray(leaf) for leaf in jax.tree.leaves(sown)])
    assert expected > 1

    def mean_loss(task, key):
        sums = jax.jit(lambda: task.loss(variables, batch, key, None)[0])()
        return float(sums.loss / sums.weight)

    key = jax.random.key(1)
    difference = mean_loss(balanced, key) - mean_loss(plain, key)
    np.testing.assert_allclose(difference, 0.5 * expected, **tolerances.EACH_FLOAT32_TOTAL)
    assert mean_loss(balanced, None) == mean_loss(plain, None)
