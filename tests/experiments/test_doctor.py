"""`seqmodels doctor`: what it finds, tests and says of a machine."""

import dataclasses
import json

import pytest

from experiments import doctor, machine
from experiments.machine import Device, Machine
from pallas_kernels.tools import operands, selftest
from pallas_kernels.tools.families import FAMILIES
from tests.experiments.legible import too_long

TWO = ("causal_conv1d", "long_conv")
VERSIONS = {"jax": "0.10.2", "jaxlib": "0.10.2"}
ON_CPU = Machine(VERSIONS, "cpu", (Device("cpu:0", "cpu", 2**34),), {}, {})
ON_GPU = Machine(
    {**VERSIONS, "jax-cuda13-plugin": "0.10.2"},
    "gpu",
    (Device("cuda:0", "NVIDIA H100", 2**36, "9.0"),),
    {},
    {},
    has_gpu=True,
)


@pytest.fixture(autouse=True)
def _terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_two_ops(tmp_path, capsys):
    path = tmp_path / "doctor.json"
    assert doctor.main(["--ops", *TWO, "--json", str(path), "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert too_long(out.replace(str(path), "")) == []
    found = json.loads(path.read_text())
    assert set(found["ops"]) == set(TWO)
    for op in found["ops"].values():
        assert 0 < op["self_test"]["forward"] < 2e-6
        assert 0 < op["self_test"]["gradients"] < 2e-6
        assert op["choices"]["cpu"][0] == "xla"
    assert found["ops"]["causal_conv1d"]["choices"]["tpu"][0] == "tpu"
    assert out.count(" ok\n") == 2
    assert "long_conv, no tpu: it has no Pallas kernel" in out


def test_all_ops_have_a_self_test():
    assert set(operands.OPS) == set(FAMILIES)


def wrong(name, args, cotangents):
    actual = selftest._program(name, None)(args, cotangents)
    outputs, gradients = actual
    return outputs, {operand: 2 * x for operand, x in gradients.items()}


def broken(name, implementation):
    raise RuntimeError("the driver\nis gone")


@pytest.mark.parametrize(
    ("place", "replacement", "message"),
    [
        ("_expected", wrong, "long_conv: 0e+00 forward, 5e-01 in a gradient"),
        ("_program", broken, "long_conv: the driver is gone"),
    ],
)
def test_what_fails_is_named_and_the_exit_code_says_so(
    place, replacement, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(selftest, place, replacement)
    path = tmp_path / "doctor.json"
    assert doctor.main(["--ops", "long_conv", "--no-progress", "--json", str(path)]) == 1
    said = capsys.readouterr()
    assert said.err == f"error: the self-test failed of {message}\n"
    assert "FAILED" in said.out
    assert path.exists()


def test_no_device_is_said_with_all_else(monkeypatch, capsys):
    nothing = Machine(VERSIONS, None, (), {}, {}, problem="no backend tpu")
    monkeypatch.setattr(machine, "inspect", lambda: nothing)
    assert doctor.main([]) == 1
    said = capsys.readouterr()
    assert said.err == "error: JAX has no device: no backend tpu\n"
    assert "jax 0.10.2" in said.out


@pytest.mark.parametrize(
    ("found", "changes", "message"),
    [
        (ON_CPU, {"has_gpu": True}, "pip install 'seqmodels[cuda]'"),
        (ON_CPU, {"has_tpu": True}, "pip install 'seqmodels[tpu]'"),
        (ON_CPU, {"has_gpu": True, "versions": ON_GPU.versions}, "jax-cuda13-plugin is installed"),
        (ON_CPU, {"has_gpu": True, "variables": {"JAX_PLATFORMS": "cpu"}}, "JAX_PLATFORMS=cpu"),
        (ON_CPU, {"versions": {"jax": "0.11.0", "jaxlib": "0.10.2"}}, "not of one version"),
        (ON_CPU, {"options": {"jax_enable_x64": True}}, "float64, which no kernel takes"),
        (ON_CPU, {"options": {"jax_disable_jit": True}}, "jax_disable_jit is on"),
        (ON_GPU, {}, "JAX takes 0.75 of a GPU's memory"),
        (ON_GPU, {"devices": (Device("cuda:0", "V100", None, "7.0"),)}, "the kernels need 8.0"),
    ],
)
def test_traps(found, changes, message):
    said = list(machine.traps(dataclasses.replace(found, **changes)))
    assert [trap for trap in said if message in trap], said


def test_a_machine_without_traps_has_none():
    assert not list(machine.traps(ON_CPU))
    quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    assert not list(machine.traps(dataclasses.replace(ON_GPU, variables=quiet)))


def test_this_machine():
    found = machine.inspect()
    assert (found.backend, found.problem) == ("cpu", None)
    assert found.options["jax_numpy_rank_promotion"] == "raise"  # of tests/conftest.py
    assert found.devices[0].memory > 0
