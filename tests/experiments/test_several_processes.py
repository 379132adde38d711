"""Real processes of two simulated devices each, that train as one."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.lm import train as lm_train
from experiments.lm.run import load_trained
from experiments.lra import train as lra_train
from seqmodels.training.metrics import TIMING_FIELDS, read_jsonl
from tests import tolerances
from tests.experiments.test_lm_commands import STORY
from tests.experiments.test_lra_train import command as lra_command

ROOT = Path(__file__).parents[2]
LIMIT = 600  # seconds after which a process is given up


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def processes(kind, commands, *, dies=None, cache):
    """Each command line as a process of ``one_of_several``; ``dies`` is (process, step)."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    where, started = f"localhost:{free_port()}", []
    for i, arguments in enumerate(commands):
        at = str(dies[1]) if dies and dies[0] == i else "0"
        flags = [
            "--distributed.coordinator", where, "--distributed.processes", str(len(commands)),
            "--distributed.process", str(i),
        ]  # fmt: skip
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.experiments.one_of_several",
                    kind,
                    at,
                    *map(str, arguments),
                    *flags,
                ],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def finished(kind, commands, **options):
    """``(exit code, stdout, stderr)`` of each."""
    with processes(kind, commands, **options) as started:
        said = [process.communicate(timeout=LIMIT) for process in started]
        return [(p.returncode, *s) for p, s in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "story.txt").write_text(STORY)
    return folder


def lm_command(folder, run, *more):
    return [
        "--data", folder / "story.txt", "--mixer", "gla", "--preset", "tiny",
        "--run-dir", folder / run, "--results-dir", folder / f"{run}-results", "--no-progress",
        "--steps", "8", "--train.eval-every", "4", "--train.checkpoint-every", "2",
        "--train.log-every", "1", *more,
    ]  # fmt: skip


def resuming(folder, run, *more):
    results = folder / f"{run}-results"
    return ["--resume", "--run-dir", folder / run, "--results-dir", results, "--no-progress", *more]


def metrics(run):
    records = read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in records]


def losses(run, after=0):
    return [record["loss"] for record in metrics(run) if record["step"] > after]


SPLITS = {
    "rows": ("--mesh", "data=2,seq=2", "--carry-state", "--ema-decay", "0.9"),
    "length": ("--mesh", "data=1,seq=4"),
}
"""What the processes split: rows, with states that go on from batch to batch, or the length of the
same rows."""


@pytest.fixture(scope="module", params=SPLITS)
def unbroken(request, folder):
    """A run of two processes that nothing has stopped."""
    run = f"unbroken-{request.param}"
    command = lm_command(folder, run, *SPLITS[request.param])
    done = finished("lm", [command] * 2, cache=folder / "cache")
    assert [code for code, *_ in done] == [0, 0], done
    first, second = (said for _, said, _ in done)
    assert "step 8: validation loss" in first
    assert "result:" in first
    assert "validation" not in second  # nor is there a result
    assert "result" not in second
    return folder / run


@pytest.mark.full
def test_two_processes_agree_and_hold_their_parts(tmp_path):
    (_, first, _), (_, second, _) = finished("agree", [[], []], cache=tmp_path)
    first, second = json.loads(first.splitlines()[-1]), json.loads(second.splitlines()[-1])
    padded = [[0, 1, 2, 3, 4, 5, 0, 0], [6, 7, 8, 9, 10, 11, 0, 0]]
    parts = [[row[i : i + 2] for row in padded] for i in (0, 2, 4, 6)]
    assert (first.pop("parts"), second.pop("parts")) == (parts[:2], parts[2:])
    assert (first.pop("rows"), second.pop("rows")) == ([[0, 1]] * 2, [[2, 3]] * 2)
    assert first.pop("refused") == "process 1: no room"
    assert second.pop("refused") == "no room"
    assert first == second
    assert first == {
        "gathered": ["", "ab"],
        "differs": "process 1 differs from process 0: a.b=1 (process 0: 0); do so",
        "shape": [2, 8],
        "votes": [0, 0, 15, 0],  # each is heard at the next call
    }


@pytest.mark.full
def test_killed_with_9_and_started_again_it_ends_bitwise_equal(unbroken, folder):
    run = unbroken.name.replace("unbroken", "killed")
    both = [lm_command(folder, run, *SPLITS[run.removeprefix("killed-")])] * 2
    with processes("lm", both, dies=(1, 5), cache=folder / "cache") as started:
        assert started[1].wait(LIMIT) == -signal.SIGKILL
    done = finished("lm", [resuming(folder, run)] * 2, cache=folder / "cache")
    assert [code for code, *_ in done] == [0, 0], done
    assert len(json.loads((folder / run / "environment.json").read_text())) == 2
    assert metrics(folder / run) == metrics(unbroken)
    trained = [
        load_trained(path / "checkpoints" / "8").variables for path in (folder / run, unbroken)
    ]
    jax.tree.map(np.testing.assert_array_equal, *trained)


@pytest.mark.full
def test_one_process_reads_the_same_batches_and_goes_on_from_their_checkpoints(
    unbroken, folder, monkeypatch
):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    alone = f"{unbroken.name}-alone"
    more = SPLITS[unbroken.name.removeprefix("unbroken-")][2:]
    assert lm_train.main([*map(str, lm_command(folder, alone, *more))]) == 0
    orders = [[r.get("order") for r in metrics(run)] for run in (folder / alone, unbroken)]
    assert orders[0] == orders[1]
    tokens = [[r.get("tokens") for r in metrics(run)] for run in (folder / alone, unbroken)]
    assert tokens[0] == tokens[1]
    np.testing.assert_allclose(
        losses(folder / alone), losses(unbroken), **tolerances.EACH_FLOAT32_SUM
    )
    run = f"{unbroken.name}-one-process"
    shutil.copytree(unbroken, folder / run)
    shutil.rmtree(folder / run / "checkpoints" / "8")
    mesh = ("--mesh", "data=1,seq=1")
    assert lm_train.main([*map(str, resuming(folder, run, *mesh))]) == 0
    np.testing.assert_allclose(
        losses(folder / run, after=6), losses(unbroken, after=6), **tolerances.EACH_FLOAT32_TERMS
    )


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["data=2,seq=2", "data=1,seq=2", "data=1,seq=1"])
def test_a_split_into_four_is_restored_on_other_meshes(mesh, tmp_path, monkeypatch):
    (tmp_path / "story.txt").write_text(STORY)
    devices = jax.devices()

    def train(command, number):
        monkeypatch.setattr(jax, "devices", lambda: devices[:number])
        assert lm_train.main([*map(str, command)]) == 0

    train(lm_command(tmp_path, "four", "--mesh", "data=1,seq=4"), 4)
    shutil.copytree(tmp_path / "four", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "8")
    data, seq = (int(part[-1]) for part in mesh.split(","))
    train(resuming(tmp_path, "other", "--mesh", mesh), data * seq)
    expected = losses(tmp_path / "four", after=6)
    actual = losses(tmp_path / "other", after=6)
    np.testing.assert_allclose(actual, expected, **tolerances.EACH_FLOAT32_TERMS)


@pytest.mark.full
def test_long_range_arena(tmp_path, monkeypatch):
    done = finished(
        "lra", [lra_command(tmp_path / "two", "--mesh", "data=4")] * 2, cache=tmp_path / "cache"
    )
    assert [code for code, *_ in done] == [0, 0], done
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    done = lra_train.main(lra_command(tmp_path / "one"))
    assert done == 0

    def result(run):
        (path,) = (tmp_path / run / "results").glob("*.json")
        return json.loads(path.read_text())

    one, two = result("one"), result("two")
    np.testing.assert_allclose(
        [r["loss"] for r in two["curve"]], [r["loss"] for r in one["curve"]],
        **tolerances.EACH_FLOAT32_SUM,
    )  # fmt: skip
    assert two["environment"]["processes"] == 2
    assert two["test_examples"] == one["test_examples"]


@pytest.mark.full
def test_processes_that_differ_are_refused_by_both(folder):
    more = (("--train.learning-rate", "0.1"), ("--train.learning-rate", "0.2"))
    commands = [lm_command(folder, "differ", "--mesh", "data=4", *m) for m in more]
    for code, _, said in finished("lm", commands, cache=folder / "cache"):
        assert code == 1
        assert (
            "process 1 differs from process 0: config.train.learning_rate=0.2 (process 0: 0.1)"
            in said
        )
    assert not (folder / "differ").exists()
