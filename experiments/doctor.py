"""Checks this installation: versions, devices, which kernel runs where, a test of each op.

    seqmodels doctor
    seqmodels doctor --ops linear_scan delta_rule
    seqmodels doctor --no-self-test --json doctor.json

The self-test runs every op forward and backward, as it runs on this machine, at a small size and
over packed documents, against its sequential reference in float64. The figures are
RMSE(error) / RMSE(reference), the largest of all outputs and of all gradients. The exit code is 1
if one is above the tolerance of float32 or cannot be run.
"""

import concurrent.futures
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.progress

from experiments import machine, terminal
from experiments.command_line import run_command
from experiments.errors import check_name
from experiments.machine import Machine
from pallas_kernels import explain
from pallas_kernels.common.dispatch import Choice
from pallas_kernels.tools import operands, selftest
from pallas_kernels.tools.families import FAMILIES
from pallas_kernels.tools.selftest import SelfTest
from pallas_kernels.tools.testing import FLOAT32_TOLERANCE
from seqmodels.ranges import Checked
from seqmodels.training.metrics import write_atomically

PLATFORMS = {"tpu": "TPU", "cuda": "GPU", "rocm": "AMD GPU", "cpu": "CPU"}


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    ops: tuple[str, ...] = ()
    """Only these ops; default: all."""
    self_test: bool = True
    """Run each op against its reference."""
    json: Path | None = None
    """Write all that is found to this file too."""
    progress: bool = True
    """Draw a progress bar."""
    traceback: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.ops:
            check_name("op", name, FAMILIES)


def doctor(arguments: Arguments) -> None:
    """Prints what is found, and writes it.

    Raises:
      ValueError: JAX has no device, or a self-test has failed; it names which.
      OSError: the file cannot be written.
    """
    found = machine.inspect()
    names = arguments.ops or tuple(FAMILIES)
    say_machine(found)
    choices: dict[str, list[Choice]] = {}
    tests: dict[str, SelfTest] = {}
    if not found.problem:
        choices = {name: _choices(name) for name in names}
        if arguments.self_test:
            tests = {test.name: test for test in run_tests(names, arguments.progress)}
        say_ops(choices, tests)
    traps = list(machine.traps(found))
    for trap in traps:
        terminal.say(f"note: {trap}")
    if arguments.json:
        write_atomically(
            arguments.json, json.dumps(_record(found, traps, choices, tests), indent=1)
        )
        terminal.say(f"written to {arguments.json}")
    failed = [f"{name}: {_why(test)}" for name, test in tests.items() if not test.passed]
    if found.problem:
        raise ValueError(f"JAX has no device: {found.problem}")
    if failed:
        raise ValueError(f"the self-test failed of {'; '.join(failed)}")


def run_tests(names: Sequence[str], progress: bool) -> Iterator[SelfTest]:
    """The tests as they end; most of their time is the compiler's, so one runs on each core."""
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        tests = [pool.submit(selftest.check, name) for name in names]
        done = rich.progress.track(
            concurrent.futures.as_completed(tests),
            total=len(tests),
            description="self-test",
            console=terminal.console(),
            disable=not progress,
        )
        for test in done:
            yield test.result()


def _choices(name: str) -> list[Choice]:
    """What runs the call of the self-test on each platform."""
    call = operands.call(name, length=selftest.LENGTH)
    args = operands.arrays(name, selftest.BATCH, selftest.LENGTH)
    return [choice for choice in explain(call, args) if choice.op == name]


def say_machine(found: Machine) -> None:
    """Prints versions, devices and settings."""
    terminal.say(", ".join(f"{name} {version or '-'}" for name, version in found.versions.items()))
    view = terminal.table()
    terminal.add_columns(view, "device", "kind", "memory", left=("device", "kind"))
    for device in found.devices:
        capability = f", compute capability {device.capability}" if device.capability else ""
        memory = "-" if device.memory is None else f"{device.memory / 2**30:.1f} GiB"
        view.add_row(device.name, device.kind + capability, memory)
    terminal.console().print(view)
    settings = {**found.variables, **found.options}
    for name, value in settings.items():
        terminal.say(f"{name}={value}")


def say_ops(choices: dict[str, list[Choice]], tests: dict[str, SelfTest]) -> None:
    """Prints what runs each op where, why nothing else does, and what the self-tests gave."""
    here = _platform()
    title = f"What runs each op; {PLATFORMS[here]} is this machine"
    caption = (
        f"Errors as RMSE(error) / RMSE(reference), at most {FLOAT32_TOLERANCE:.0e}. tpu and gpu "
        "are Pallas kernels, xla is the portable path. Other arguments may get another: "
        "pallas_kernels.explain(op, ...) says which and why."
    )
    view = terminal.table(title, caption)
    columns = ("op", *PLATFORMS.values(), "forward", "gradients", "")
    terminal.add_columns(view, *columns, left=("op", *PLATFORMS.values(), ""))
    for name, listed in choices.items():
        taken = {choice.platform: choice.implementation or "-" for choice in listed}
        test = tests.get(name)
        figures = ["-", "-", ""] if test is None else _figures(test)
        view.add_row(name, *(taken.get(platform, "-") for platform in PLATFORMS), *figures)
    terminal.console().print(view)
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, listed in choices.items():
        for choice in listed:
            for kernel, reason in choice.skipped.items():
                kernels = reasons.setdefault((name, reason), [])
                if reason != f"it does not run on {choice.platform}" and kernel not in kernels:
                    kernels.append(kernel)
    for (name, reason), kernels in reasons.items():
        if kernels:
            terminal.say(f"{name}, no {' and no '.join(sorted(kernels))}: {reason}")


def _platform() -> str:
    """That of the default device, as programs are lowered for it."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"


def _figures(test: SelfTest) -> list[str]:
    ratios = ["-" if ratio is None else f"{ratio:.0e}" for ratio in (test.forward, test.gradients)]
    return [*ratios, "ok" if test.passed else "FAILED"]


def _why(test: SelfTest) -> str:
    return test.error or f"{test.forward:.0e} forward, {test.gradients:.0e} in a gradient"


def _record(
    found: Machine,
    traps: Sequence[str],
    choices: Mapping[str, Sequence[Choice]],
    tests: Mapping[str, SelfTest],
) -> dict[str, Any]:
    return {
        **dataclasses.asdict(found),
        "notes": traps,
        "ops": {
            name: {
                "choices": {c.platform: [c.implementation, c.skipped] for c in listed},
                "self_test": tests[name]._asdict() if name in tests else None,
            }
            for name, listed in choices.items()
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(Arguments, doctor, arguments, description=__doc__, prog="experiments.doctor")


if __name__ == "__main__":
    sys.exit(main())
