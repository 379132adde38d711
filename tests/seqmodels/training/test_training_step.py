"""One step: accumulation, data parallelism, batches that are not finite, evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.parallel.mesh import make_mesh, put_batch
from seqmodels.training.evaluation import evaluate
from seqmodels.training.state import create_state, optimizer_of
from seqmodels.training.step import gradients, make_eval_step, make_train_step
from tests import tolerances
from tests.seqmodels.training.compilation import compiled_once
from tests.seqmodels.training.toy import CONFIG, VALIDATION, make_batch, toy_task

TRUE = np.asarray(True)


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def train(mesh, *, steps=3, poison=(), proceed=TRUE, skip=False, **options):
    task = toy_task(**options)
    state, optimizer = create_state(task, CONFIG, mesh), optimizer_of(task, CONFIG)
    step = make_train_step(task, optimizer, mesh, skip_non_finite=skip)
    metrics = []
    for number in range(steps):
        batch = make_batch(np.arange(8) + 8 * number, poison=number in poison)
        state, measured = step(state, put_batch(batch, mesh), proceed)
        metrics.append(jax.device_get(measured))
    return state, metrics


grad = jax.jit(gradients, static_argnums=(0, 4))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("count", [2, 4])
def test_accumulated_gradients_equal_the_big_batch(count):
    task = toy_task(batch_norm=False, dropout=0.0)
    variables = task.init(jax.random.key(0))
    batch = make_batch(np.arange(8)) | {"weights": np.asarray([1, 1, 0, 1, 1, 0, 0, 1], np.float32)}
    key = jax.random.key(1)
    big, big_sums, *_ = grad(task, variables, batch, key, 1)
    small, small_sums, *_ = grad(task, variables, batch, key, count)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_TERMS_OF_ONE),
        big,
        small,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_TERMS),
        big_sums,
        small_sums,
    )


def test_accumulation_updates_the_statistics_by_each_micro_batch():
    task = toy_task()
    variables = task.init(jax.random.key(0))
    batch, key = make_batch(np.arange(8)), jax.random.key(1)
    _, _, statistics, _ = grad(task, variables, batch, key, 2)
    for half in (batch_rows(batch, 0), batch_rows(batch, 1)):
        _, _, stats, _ = grad(task, variables, half, key, 1)
        variables = {**variables, "batch_stats": stats}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_TERMS_OF_ONE),
        statistics,
        variables["batch_stats"],
    )


def batch_rows(batch, start):
    return {name: value[start::2] for name, value in batch.items()}


def test_eight_devices_equal_one():
    single, single_metrics = train(one_device(), dropout=0.0)
    sharded, sharded_metrics = train(make_mesh(), dropout=0.0)
    for a, b in zip(single_metrics, sharded_metrics, strict=True):
        np.testing.assert_allclose(a.sums.loss, b.sums.loss, **tolerances.EACH_FLOAT32_SUM)
        assert a.sums.correct == b.sums.correct
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances.EACH_FLOAT32_LAYERS),
        (single.params, single.batch_stats),
        (sharded.params, sharded.batch_stats),
    )
    leaf = jax.tree.leaves(sharded.params)[0]
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == 8


def test_a_batch_that_is_not_finite_changes_nothing():
    good, _ = train(one_device(), steps=2)
    bad, metrics = train(one_device(), steps=3, poison={2})
    assert [bool(m.finite) for m in metrics] == [True, True, False]
    assert_equal(bad.replace(rng=0), good.replace(rng=0))


def test_a_skipped_batch_is_counted_and_not_applied():
    good, _ = train(one_device(), steps=2)
    bad, _ = train(one_device(), steps=3, poison={2}, skip=True)
    assert bad.step == 3
    assert_equal((bad.params, bad.batch_stats), (good.params, good.batch_stats))
    assert_equal(bad.opt_state, good.opt_state)


def test_statistics_that_overflow_are_not_finite():
    """BatchNorm hides an overflow: an infinite variance makes finite outputs."""
    mesh = one_device()
    task = toy_task()
    state, optimizer = create_state(task, CONFIG, mesh), optimizer_of(task, CONFIG)
    params = jax.tree.map(lambda p: p, state.params)
    params["ssm_embedding"]["embedding"] = params["ssm_embedding"]["embedding"] * 1e25
    step = make_train_step(task, optimizer, mesh)
    batch = put_batch(make_batch(np.arange(8)), mesh)
    new, metrics = step(state.replace(params=params), batch, TRUE)
    assert not metrics.finite
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(new.batch_stats))


def test_without_proceed_nothing_changes():
    start, _ = train(one_device(), steps=0)
    after, _ = train(one_device(), steps=2, proceed=np.asarray(False))
    assert_equal(after.replace(rng=0), start.replace(rng=0))


def test_each_step_has_its_own_dropout():
    task = toy_task(dropout=0.5)
    mesh = one_device()
    state, optimizer = create_state(task, CONFIG, mesh), optimizer_of(task, CONFIG)
    step = make_train_step(task, optimizer, mesh)
    batch = put_batch(make_batch(np.arange(8)), mesh)
    losses = []
    for number in (0, 1, 1):
        copy = jax.tree.map(lambda x: x.copy(), state.replace(step=jnp.asarray(number)))
        losses.append(float(step(copy, batch, TRUE)[1].sums.loss))
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]


def test_rows_of_weight_0_do_not_count():
    mesh = one_device()
    task = toy_task()
    state = create_state(task, CONFIG, mesh)
    eval_step = make_eval_step(task, mesh)
    whole = evaluate(eval_step, state.variables, VALIDATION[:1], mesh)
    padded = make_batch(np.asarray([*range(8), 50, 51, 52, 53]))
    padded["weights"][8:] = 0
    filled = evaluate(eval_step, state.variables, [padded], mesh)
    assert filled.examples == whole.examples == 8
    assert filled.accuracy == whole.accuracy
    np.testing.assert_allclose(filled.loss, whole.loss, **tolerances.EACH_FLOAT32_TERMS)


def test_evaluating_nothing_is_an_error():
    mesh = one_device()
    task = toy_task()
    state = create_state(task, CONFIG, mesh)
    with pytest.raises(ValueError, match="no examples"):
        evaluate(make_eval_step(task, mesh), state.variables, [], mesh)
