"""Executes the notebooks in notebooks/ and writes them, with their outputs, to docs/notebooks/.

    python -m experiments.notebooks
    python -m experiments.notebooks --only tour kernel

A notebook is a text file in jupytext's percent format. Each is executed in a kernel of its own, on
the CPU, from the repository's root. Programs are compiled with XLA's quick code generator, as in
the tests; --optimised compiles as users do. A cell that fails ends the command, which names the
notebook and the cell. What is written are .ipynb files, which git ignores.

Needs the extra "notebooks", or "execute", which is the same without JupyterLab.
"""

import asyncio
import dataclasses
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from experiments import places, terminal
from experiments.command_line import UsageError, run_command
from pallas_kernels.tools.testing import QUICK
from seqmodels.ranges import Checked, Size

SOURCES = places.ROOT / "notebooks"
FORMAT = "py:percent"
KNOWN = ("xla_backend_optimization_level", "xla_cpu_parallel_codegen_split_count")
"""The options of ``QUICK`` that libtpu knows too, which ends a process where it does not."""


@dataclasses.dataclass(frozen=True)
class Arguments(Checked):
    """Arguments of the command line."""

    only: tuple[str, ...] = ()
    """Names of notebooks, e.g. quickstart; default all."""
    sources: Path = SOURCES
    """Folder of the notebooks."""
    out: Path = places.ROOT / "docs" / "notebooks"
    """Folder of the executed notebooks."""
    seconds: Size = 600
    """Longest time of one cell."""
    jobs: Size = os.cpu_count() or 1
    """How many to execute at the same time; default one for each core."""
    optimised: bool = False
    """Compile with all of XLA's optimisations; cells run faster and compile much slower."""
    traceback: bool = False
    """Show the whole traceback of an error."""


class CellError(ValueError):
    """A cell failed; the message names the notebook and the cell."""


def find(sources: Path, only: tuple[str, ...] = ()) -> list[Path]:
    """The notebooks of a folder, by name.

    Raises:
      UsageError: there is none, or none of a name in ``only``.
    """
    found = {path.stem: path for path in sorted(sources.glob("*.py"))}
    if not found:
        raise UsageError(f"--sources {sources}: there are no notebooks (*.py)")
    for name in only:
        if name not in found:
            raise UsageError(f"--only {name}: no such notebook; choose among {', '.join(found)}")
    return [path for name, path in found.items() if name in only or not only]


def environment(*, optimised: bool = False) -> dict[str, str]:
    """The environment of a kernel: on the CPU unless told otherwise, the repository importable."""
    inherited = dict(os.environ)
    inherited.setdefault("JAX_PLATFORMS", "cpu")
    paths = (str(places.ROOT), inherited.get("PYTHONPATH", ""))
    inherited["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if not optimised:
        flags = [f"--{name}={QUICK[name]}" for name in KNOWN]
        inherited["XLA_FLAGS"] = " ".join([inherited.get("XLA_FLAGS", ""), *flags]).strip()
    return inherited


def execute(path: Path, *, seconds: int = 600, env: dict[str, str] | None = None) -> Any:
    """The notebook with its outputs, an ``nbformat.NotebookNode``.

    Args:
      path: the text file.
      seconds: longest time of a cell.
      env: of the kernel.

    Raises:
      CellError: a cell failed, took too long or ended the kernel.
      ImportError: jupytext or nbclient is not installed.
    """
    import jupytext
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    notebook = jupytext.read(path, fmt=FORMAT)
    last: list[int] = []
    try:
        with tempfile.TemporaryDirectory() as sockets:  # its own, and no ports
            kernel = {"transport": "ipc", "ip": str(Path(sockets) / "kernel")}
            client = NotebookClient(
                notebook,
                timeout=seconds,
                kernel_name="python3",
                config=Config({"KernelManager": kernel}),
                resources={"metadata": {"path": str(places.ROOT)}},
                on_cell_execute=lambda cell, cell_index: last.append(cell_index),
            )
            return asyncio.run(client.async_execute(env=environment() if env is None else env))
    except CellExecutionError as error:
        said = [f"{error.ename}: {error.evalue}".strip(), *printed_errors(notebook, last[-1])]
        raise CellError(f"{where(path, notebook, last[-1])}: {'; '.join(said)}") from error
    except CellTimeoutError as error:
        raise CellError(f"{where(path, notebook, last[-1])}: took over {seconds} s") from error
    except DeadKernelError as error:
        raise CellError(f"{where(path, notebook, last[-1])}: its kernel died") from error


def where(path: Path, notebook: Any, index: int) -> str:
    """Names a cell: its number among the code cells, from 1 as Jupyter counts, and first line."""
    number = sum(cell.cell_type == "code" for cell in notebook.cells[: index + 1])
    lines = [line for line in notebook.cells[index].source.splitlines() if line.strip()]
    return f"{path.name}, code cell {number} ({lines[0].strip() if lines else 'empty'})"


def printed_errors(notebook: Any, index: int) -> list[str]:
    """The last line that a cell wrote to stderr, if it did."""
    outputs = notebook.cells[index].outputs
    text = "".join(output.text for output in outputs if output.get("name") == "stderr")
    return text.strip().splitlines()[-1:]


def run(arguments: Arguments) -> None:
    """Executes and writes; raises ``UsageError``, ``CellError`` or ``ImportError``."""
    try:
        import jupytext  # noqa: F401
        import nbclient  # noqa: F401
        import nbformat
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed: pip install 'seqmodels[execute]'"
        ) from error
    paths = find(arguments.sources, arguments.only)
    arguments.out.mkdir(parents=True, exist_ok=True)
    env = environment(optimised=arguments.optimised)

    def write(path: Path) -> None:
        start = time.perf_counter()
        notebook = execute(path, seconds=arguments.seconds, env=env)
        into = arguments.out / f"{path.stem}.ipynb"
        nbformat.write(notebook, into)
        terminal.say(f"{path.stem}: {time.perf_counter() - start:.0f} s; written: {into}")

    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(write, path) for path in paths]
        try:
            for notebook in as_completed(running):
                notebook.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that run end in their own time
            raise


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    return run_command(Arguments, run, arguments, description=__doc__, prog="experiments.notebooks")


if __name__ == "__main__":
    sys.exit(main())
