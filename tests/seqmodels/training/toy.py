"""A tiny classifier with BatchNorm and dropout, its data, and runs of it."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.mixers.base import ParamLabel
from seqmodels.parallel.mesh import make_mesh
from seqmodels.training.config import TrainConfig
from seqmodels.training.loop import fit
from seqmodels.training.run_directory import open_run
from seqmodels.training.task import Task, classification

CLASSES, LENGTH, VOCABULARY, WIDTH = 3, 6, 7, 8


class ToyModel(nn.Module):
    """Embedding, BatchNorm, mean over real tokens, dropout, head."""

    batch_norm: bool = True
    dropout: float = 0.2

    @nn.compact
    def __call__(self, inputs, segment_ids, deterministic=True):
        mask = (segment_ids > 0)[..., None]
        x = nn.Embed(VOCABULARY, WIDTH, name="ssm_embedding")(inputs)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=deterministic, momentum=0.9)(x, mask=mask)
        x = jnp.sum(x * mask, axis=1) / jnp.maximum(mask.sum(1), 1)
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        return nn.Dense(CLASSES)(x)


def param_labels(params):
    """Embedding in the group "ssm" without decay, biases without decay, the rest decays."""

    def label(path, leaf):
        names = jax.tree_util.keystr(path)
        if "ssm" in names:
            return ParamLabel(group="ssm", weight_decay=False)
        return ParamLabel(weight_decay="bias" not in names)

    return jax.tree_util.tree_map_with_path(label, params)


def toy_task(**options) -> Task:
    return classification(ToyModel(**options), param_labels, length=LENGTH)


def make_batch(index, *, poison=False):
    """The examples `index`: the label is the first token modulo the classes."""
    rng = np.random.default_rng(5)
    inputs = rng.integers(1, VOCABULARY, (1000, LENGTH))[index]
    lengths = rng.integers(2, LENGTH + 1, 1000)[index]
    segment_ids = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    weights = np.ones(len(index), np.float32)
    if poison:
        weights[0] = np.nan
    return {
        "inputs": (inputs * segment_ids).astype(np.int32),
        "segment_ids": segment_ids,
        "labels": (inputs[:, 0] % CLASSES).astype(np.int32),
        "weights": weights,
        "index": np.asarray(index, np.int32),
    }


class ToyBatches:
    """Endless batches whose only state is how many were taken; `poison` names bad batches."""

    def __init__(self, batch_size=8, poison=()):
        self.batch_size, self.poison, self.taken = batch_size, poison, 0

    def __iter__(self):
        return ToyBatches(self.batch_size, self.poison)

    def __next__(self):
        self.taken += 1
        index = np.random.default_rng(self.taken).permutation(1000)[: self.batch_size]
        return make_batch(index, poison=self.taken in self.poison)

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


VALIDATION = [make_batch(np.arange(i, i + 8)) for i in range(0, 24, 8)]

CONFIG = TrainConfig(
    steps=12,
    batch_size=8,
    learning_rate=0.05,
    group_learning_rates={"ssm": 0.02},
    weight_decay=0.01,
    warmup_steps=2,
    log_every=3,
    eval_every=5,
    checkpoint_every=4,
    seed=3,
)


def run_toy(run_dir, config=CONFIG, *, poison=(), resume=False, on_event=None, **options):
    """Trains the toy on one device."""
    mesh = options.pop("mesh", None)
    if mesh is None:
        mesh = make_mesh(devices=jax.devices()[:1])
    return fit(
        toy_task(**options),
        ToyBatches(config.batch_size, poison),
        config,
        open_run(Path(run_dir), {"train": dataclasses.asdict(config)}, resume=resume),
        validation=VALIDATION,
        mesh=mesh,
        show_progress=False,
        on_event=on_event,
    )


def killer(what, step):
    """An `on_event` that ends this process at an event, as SIGKILL does."""

    def on_event(event, at):
        if (event, at) == (what, step):
            os.kill(os.getpid(), signal.SIGKILL)

    return on_event


def kill_at_commit(step):
    """Kills this process when all of a checkpoint is written, but not yet under its name."""
    rename = os.rename

    def killing(source, target, *args, **options):
        if Path(target).name == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **options)

    os.rename = killing


if __name__ == "__main__":
    # python -m tests.seqmodels.training.toy RUN_DIR EVENT STEP [resume]
    jax.config.update("jax_num_cpu_devices", 8)
    directory, event, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if event == "commit":
        kill_at_commit(at)
    run_toy(directory, resume="resume" in sys.argv, on_event=killer(event, at))
