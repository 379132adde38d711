"""Checks, times and trains on the GPU that is here, in twelve minutes; goes on where it stopped.

    seqmodels gpu                            all parts
    seqmodels gpu --only check peers         some of them
    seqmodels gpu --dry-run                  the same code with short rows, on any machine

Each part runs in a process of its own with a limit of its own, and leaves one file in --output;
parts that have one are not run again, and what a part had found when its time was up stays in
<part>.partial.json. The parts:

    check    every op at shapes of published models, outputs and gradients, against its reference
             in float64 on the CPU
    peers    linear attention and the delta rule beside flash-linear-attention and PyTorch's
             attention
    bench-*  a family beside plain JAX
    train    S5 on ListOps for --train-minutes

The environment is that of the command: nothing is installed.
"""

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from experiments import places, terminal
from experiments.command_line import run_command
from experiments.kernels import peers
from experiments.kernels.bench import run, table
from experiments.kernels.results import FAILED, Result, Target
from experiments.kernels.values import arguments
from pallas_kernels.tools import testing
from pallas_kernels.tools.families import TABULATED
from pallas_kernels.tools.programs import Shape, program
from seqmodels.ranges import Checked, Positive, Size

PROG = "experiments.gpu"
RESULTS, RUNS = places.output("gpu"), Path("runs/gpu")
BOTH = "forward+backward"
COMPARED = "compared with the reference in float64"
TOKENS = 200
"""Length of a checked row: several chunks, the last not full. The reference keeps every state."""

SECONDS = {"check": 300, "peers": 120, **{f"bench-{name}": 60 for name in TABULATED}, "train": 180}
"""Limit of time for each part."""
if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(SECONDS)]  # the choices of the command line


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    only: tuple[Name, ...] = tuple(SECONDS)
    """Only these parts, in this order."""
    minutes: Positive = 12.0
    """Budget of all parts together."""
    train_minutes: Positive = 2.0
    """Budget of the training."""
    repetitions: Size = 3
    """Interleaved repetitions of every timed program."""
    output: Path | None = None
    """The folder of the results; default: experiments/results/gpu, of a dry run runs/gpu."""
    dry_run: bool = False
    """Short rows, on whatever device there is."""
    here: bool = False
    """Run the parts in this process, without limits of time."""
    traceback: bool = False
    """Show the whole traceback of an error."""

    @property
    def folder(self) -> Path:
        return self.output or (RUNS if self.dry_run else RESULTS)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part's settings, as its file has them."""

    name: Name
    repetitions: int
    dry_run: bool
    output: Path

    @property
    def path(self) -> Path:
        return self.output


def gpu(arguments: Arguments) -> None:
    """Runs the parts that have no file.

    Raises:
      ValueError: there is no GPU; or a part failed or ran out of time, each is named.
      OSError: the folder cannot be written.
    """
    if jax.default_backend() != "gpu" and not arguments.dry_run:
        raise ValueError(
            f"JAX sees no GPU here (backend {jax.default_backend()!r}); `seqmodels doctor` says "
            "why, and --dry-run runs the same code on what there is"
        )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    end, problems = time.monotonic() + 60 * arguments.minutes, []
    for name in arguments.only:
        path = arguments.folder / f"{name}.json"
        if path.exists():
            terminal.say(f"{name}: {path} is there; delete it to run the part again")
            continue
        if arguments.here:
            _finish(arguments, name, path)
            continue
        left = min(end - time.monotonic(), SECONDS[name])
        problem = _child(arguments, name, left) if left > 0 else "no time was left for it"
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Give the same command again to go on")


def _child(arguments: Arguments, name: Name, seconds: float) -> str | None:
    """Runs a part in a process of its own; what went wrong."""
    command = [sys.executable, "-m", PROG, "--here", "--only", name]
    command += ["--output", str(arguments.folder), "--repetitions", str(arguments.repetitions)]
    command += ["--train-minutes", str(arguments.train_minutes)]
    command += ["--dry-run"] * arguments.dry_run
    # PyTorch is beside JAX in one process: neither may take all of the memory.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return None if done.returncode == 0 else f"exit code {done.returncode}"


def _finish(arguments: Arguments, name: Name, path: Path) -> None:
    """Runs a part; its file is named as finished when it is."""
    if name == "train":
        _train(arguments, path)
        return
    partial = path.with_suffix(".partial.json")
    part = Part(name, arguments.repetitions, arguments.dry_run, partial)
    console = terminal.console()
    found = run(part, ROWS[name](part), console, peers.PACKAGES)
    if name == "check":
        for row in found:
            errors = ", ".join(f"{of} {error:.1e}" for of, error in row.ratios.items())
            terminal.say(f"{row.case}: {errors or row.figures.get('reason')}")
    else:
        console.print(table(found))
    failed = [row.case for row in found if row.kind == FAILED]
    missed = [row.case for row in found if not all(row.to_json()["met"].values())]
    if failed or missed:
        raise ValueError(f"failed: {', '.join([*failed, *missed])}")
    partial.replace(path)


def checks(part: Part) -> Iterator[Result]:
    """Every family at its representative shapes, shortened."""
    for family in TABULATED.values():
        for name in family.representatives[: 1 if part.dry_run else None]:
            shape = family.named(name)
            short = shape.scaled(min(TOKENS / shape.length, 1))
            yield checked(family.op, family.name, dataclasses.replace(short, name=name))


def checked(op: Callable[..., Any], name: str, shape: Shape) -> Result:
    """The op as it runs here; RMSE(error) / RMSE(reference), the largest of the gradients."""
    described = f"batch {shape.batch}, length {shape.length}"
    row = Result(f"{name}, {shape.name}", jax.devices()[0].device_kind, COMPARED, described)
    start = time.perf_counter()
    try:
        args = arguments(op, shape, document=TOKENS // 3)
        actual = jax.device_get(jax.jit(program(op, shape, BOTH)[0])(*args))
        expected = reference(op, shape, args)
        errors = jax.tree.map(testing.rmse_ratio, actual, expected)
    except Exception as problem:  # whatever a compiler or a driver raises is the answer
        return dataclasses.replace(
            row, kind=FAILED, figures={"reason": " ".join(str(problem).split())}
        )
    narrow = any(x.dtype == jnp.bfloat16 for x in args)
    bound = testing.BFLOAT16_TOLERANCE if narrow else testing.FLOAT32_TOLERANCE
    ratios = {"output": errors[0], "gradients": max(errors[1])}
    return dataclasses.replace(
        row,
        figures={"seconds": time.perf_counter() - start},
        ratios=ratios,
        targets=dict.fromkeys(ratios, Target("at most", bound)),
    )


def reference(op: Callable[..., Any], shape: Shape, args: Sequence[Any]) -> Any:
    """Outputs and gradients of the sequential reference in double precision."""

    def sequential(**given: Any) -> Any:
        return op(**given, implementation="reference")

    device, options = testing.oracle_device()
    with jax.enable_x64(True), jax.default_device(device):
        given = jax.device_get(list(args))
        wide = [testing.doubled(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in given]
        return jax.device_get(jax.jit(program(sequential, shape, BOTH)[0], **options)(*wide))


def benchmark(part: Part) -> Iterator[Result]:
    """What `seqmodels kernels bench --only gpu` times of a family."""
    family = importlib.import_module(f"experiments.kernels.{part.name.removeprefix('bench-')}")
    return family.gpu(part.repetitions, ())


def beside_peers(part: Part) -> Iterator[Result]:
    """See `experiments.kernels.peers`."""
    return peers.rows(part.repetitions, 1 / 64 if part.dry_run else 1.0)


ROWS: dict[str, Callable[[Part], Iterator[Result]]] = {
    "check": checks,
    "peers": beside_peers,
    **dict.fromkeys((name for name in SECONDS if name.startswith("bench-")), benchmark),
}


def _train(arguments: Arguments, path: Path) -> None:
    """Trains; the result is the one that `seqmodels lra train` writes."""
    from experiments.lra import train

    preset = "cpu" if arguments.dry_run else "gpu-15min"
    results, run_dir = RUNS / "results", RUNS / preset
    options = ["--no-progress", f"--results-dir={results}", f"--run-dir={run_dir}"]
    if (run_dir / "checkpoints").is_dir():
        options += ["--resume"]
    else:
        options += ["--task=listops", "--model=s5", f"--preset={preset}"]
        options += [f"--minutes={arguments.train_minutes}"]
    if train.main(options) != 0:
        raise ValueError("the training failed; its message is above")
    (written,) = results.glob("*.json")
    written.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(Arguments, gpu, arguments, description=__doc__, prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
