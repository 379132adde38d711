"""The run on a GPU, without one: what it checks and compares, and how it goes on."""

import dataclasses
import json
import subprocess
import types

import pytest

from experiments import gpu
from experiments.kernels import peers
from experiments.kernels.results import FAILED, NOT_RUN, TIMED
from pallas_kernels.tools.families import FAMILIES
from tests.pytorch import torch

KEYS = dataclasses.replace(
    FAMILIES["linear_attention"].named("key-bench"), length=12, groups=2, heads=2, key_size=4,
    value_size=4, dtype="float32",
)  # fmt: skip


def arguments(tmp_path, *more):
    return ["--output", str(tmp_path), *more]


def test_without_a_gpu_it_says_what_to_do(tmp_path, capsys):
    assert gpu.main(arguments(tmp_path)) == 1
    assert "JAX sees no GPU here (backend 'cpu')" in capsys.readouterr().err


def test_an_op_is_held_to_its_reference():
    family = FAMILIES["linear_attention"]
    right = gpu.checked(family.op, family.name, KEYS)
    assert right.to_json()["met"] == {"output": True, "gradients": True}

    def wrong(*args, implementation=None, **named):
        o, state = family.op(*args, **named, implementation=implementation)
        return (o if implementation == "reference" else 1.001 * o), state

    met = gpu.checked(wrong, family.name, KEYS).to_json()["met"]
    assert met == {"output": False, "gradients": False}

    def broken(*args, **named):
        raise RuntimeError("no\n kernel")

    found = gpu.checked(broken, family.name, KEYS)
    assert (found.kind, found.figures) == (FAILED, {"reason": "no kernel"})


def naive_gla(q, k, v, g):
    """What flash-linear-attention's function of these arguments computes, and how it returns it."""
    state, out = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[3]), []
    for t in range(q.shape[1]):
        state = torch.exp(g[:, t])[..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        out.append(q.shape[3] ** -0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, 1), state


@pytest.mark.parametrize("groups", [1, 2])
def test_peers_are_given_the_same_numbers(groups, monkeypatch):
    (peer,) = (each for each in peers.PEERS if each.function == "chunk_gla")
    shape = dataclasses.replace(KEYS, groups=groups)
    row = peers.compared(peer, shape, 1)
    assert (row.kind, set(row.ratios)) == (TIMED, {"torch attention"})
    assert "No module named 'fla'" in row.figures["missing"]
    module = types.SimpleNamespace(chunk_gla=naive_gla)
    monkeypatch.setattr(peers.importlib, "import_module", lambda _: module)
    row = peers.compared(peer, shape, 1)
    assert row.figures["difference from fla"] < 1e-6
    assert set(row.ratios) == {"torch attention", "fla"}


def test_parts_with_a_file_are_kept_and_failures_are_named(tmp_path, monkeypatch, capsys):
    calls = []

    def start(command, timeout, **_):
        name = command[command.index("--only") + 1]
        calls.append((name, timeout))
        if name == "peers":
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=3 if name == "train" else 0)

    monkeypatch.setattr(gpu.subprocess, "run", start)
    (tmp_path / "check.json").write_text("{}")
    assert gpu.main(arguments(tmp_path, "--dry-run", "--minutes", "2")) == 1
    assert [name for name, _ in calls] == [name for name in gpu.SECONDS if name != "check"]
    assert all(seconds <= 120 for _, seconds in calls)
    err = capsys.readouterr().err
    assert "peers: stopped after 120 s; train: exit code 3. Give the same command again" in err


def test_a_part_leaves_its_rows(tmp_path, monkeypatch):
    """In a process of its own, as it is; and what was found stays where one misses its bound."""
    row = gpu.Result("op", "cpu", gpu.COMPARED, "length 3", ratios={"output": 1e-7})
    monkeypatch.setitem(gpu.ROWS, "check", lambda part: iter([row]))
    options = arguments(tmp_path, "--here", "--dry-run", "--only", "check")
    assert gpu.main(options) == 0
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["cases"][0]["ratios"] == {"output": 1e-7}
    (tmp_path / "check.json").unlink()
    missed = dataclasses.replace(row, targets={"output": gpu.Target("at most", 1e-8)})
    monkeypatch.setitem(gpu.ROWS, "check", lambda part: iter([missed]))
    assert gpu.main(options) == 1
    assert [path.name for path in (tmp_path).iterdir()] == ["check.partial.json"]


def test_benchmarks_without_a_gpu_are_not_run():
    for name, rows in gpu.ROWS.items():
        if name.startswith("bench-"):
            assert {row.kind for row in rows(gpu.Part(name, 1, True, None))} == {NOT_RUN}
