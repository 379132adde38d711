"""Several processes that train as one: how they find each other, and that they agree.

Everything else is JAX's: a mesh of all processes' devices, programs that every process starts in
the same order, arrays of which each process holds a part. Each reads its own rows of a batch
(``seqmodels.parallel.rows_of_process``); the first one alone writes metrics and results.
"""

import contextlib
import dataclasses
import itertools
import json
import socket
import sys
import threading
import time
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the store of JAX's coordinator has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqmodels.ranges import Checked, Count, Size
from seqmodels.training.checkpoint import flatten

_SHUTDOWN_SECONDS = 60  # how long a process that fails waits for the others to end too


@dataclasses.dataclass(frozen=True)
class Distributed(Checked):
    """How a process finds the others; by default there are none."""

    coordinator: str | None = None
    """HOST:PORT of process 0, which listens there; the same for all processes. For processes
    started by hand, together with the next two."""
    processes: Size | None = None
    """How many processes there are."""
    process: Count | None = None
    """Which of them this is, from 0."""
    detect: bool = False
    """Take the three from what has started the processes: SLURM, Open MPI, Kubernetes or a TPU
    pod."""
    timeout: Size = 300
    """Seconds to wait for the other processes at the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {
            f"--distributed.{name}": getattr(self, name)
            for name in ("coordinator", "processes", "process")
        }
        missing = [name for name, value in given.items() if value is None]
        if self.detect and len(missing) < len(given):
            raise ValueError(
                "--distributed.detect finds coordinator, processes and process by itself: leave "
                f"{', '.join(name for name in given if name not in missing)} out"
            )
        if not self.detect and missing and len(missing) < len(given):
            raise ValueError(
                f"{', '.join(missing)} missing: processes started by hand need all of "
                "--distributed.coordinator HOST:PORT, --distributed.processes and "
                "--distributed.process"
            )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(
                    f"--distributed.coordinator {self.coordinator!r} must be HOST:PORT, the host "
                    "of process 0 and a free port there, e.g. 10.0.0.1:1234"
                )
        process, processes = self.process, self.processes
        if process is not None and processes is not None and process >= processes:
            raise ValueError(
                f"--distributed.process {process} does not fit --distributed.processes "
                f"{processes}: they are numbered from 0 to {processes - 1}"
            )

    def start(self) -> None:
        """Waits until all processes are there; does nothing where there is one.

        To be called before anything else asks for devices.

        Raises:
          ValueError: nothing was detected, the others do not come, or processes differ in their
            number of devices.
        """
        if self.coordinator is None and not self.detect:
            return
        if self.process:
            self._find_coordinator()
        where = "" if self.coordinator is None else f" at {self.coordinator}"
        patience = threading.Timer(
            10, print, [f"waiting for all processes{where}, {self.timeout} s at most"],
            {"file": sys.stderr},
        )  # fmt: skip
        patience.daemon = True
        patience.start()
        try:
            jax.distributed.initialize(
                self.coordinator,
                self.processes,
                self.process,
                initialization_timeout=self.timeout,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
        except ValueError as error:
            raise ValueError(
                f"--distributed.detect finds neither SLURM, Open MPI, Kubernetes nor a TPU pod "
                f"({error}); give --distributed.coordinator, --distributed.processes and "
                "--distributed.process instead"
            ) from error
        finally:
            patience.cancel()
        check_devices(Counter(device.process_index for device in jax.devices()))

    def _find_coordinator(self) -> None:
        """Waits until process 0 listens; JAX, where it does not, ends the process by a signal."""
        host, _, port = typing.cast(str, self.coordinator).rpartition(":")
        until = time.monotonic() + self.timeout
        while True:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > until:
                    raise ValueError(
                        f"--distributed.coordinator {self.coordinator}: nothing listens there "
                        f"after {self.timeout} s ({error}); start process 0, on that host, and "
                        "see that the port can be reached from here"
                    ) from error
                time.sleep(0.2)


def check_devices(devices: Mapping[int, int]) -> None:
    """Raises ValueError unless all processes have as many devices, given by process."""
    if len(set(devices.values())) > 1:
        counts = ", ".join(f"process {i} has {n}" for i, n in sorted(devices.items()))
        raise ValueError(
            f"all processes need the same number of devices: {counts}; give each "
            f"{min(devices.values())} (on CPUs: JAX_NUM_CPU_DEVICES={min(devices.values())})"
        )


def is_first() -> bool:
    """Whether this process writes what is written once: metrics, results, messages."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """What each process passes, on all of them; waits for all.

    Not by a collective of the devices: on CPUs they wait 30 s for each other, and give up.
    """
    processes = jax.process_count()
    if processes == 1:
        return [text]
    client: Any = distributed.global_state.client
    key = f"seqmodels/{next(_gathered)}"
    client.key_value_set_bytes(f"{key}/{jax.process_index()}", text.encode() + b".")  # not empty
    return [
        client.blocking_key_value_get_bytes(f"{key}/{i}", _PATIENCE_MS)[:-1].decode()
        for i in range(processes)
    ]


_gathered = itertools.count()  # every process counts the same calls
_PATIENCE_MS = 24 * 3600 * 1000  # a process that dies ends the others, however long they would wait


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes go on behind this, or none: what one refuses inside, all refuse."""
    refused: Exception | None = None
    try:
        yield
    except Exception as error:
        refused = error
    said = gather("" if refused is None else f"{refused}" or type(refused).__name__)
    if refused is not None:
        raise refused
    for process, message in enumerate(said):
        if message:
            raise ValueError(f"process {process}: {message}")


def require_equal(record: Mapping[str, Any], advice: str) -> None:
    """Raises ValueError on all processes unless each passes the same record.

    Args:
      record: JSON-able.
      advice: ends the message, what to do.
    """
    first, *others = (flatten(json.loads(said)) for said in gather(json.dumps(dict(record))))
    for process, other in enumerate(others, 1):
        different = [
            f"{name}={other.get(name)!r} (process 0: {first.get(name)!r})"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
        if different:
            raise ValueError(
                f"process {process} differs from process 0: {'; '.join(different)}; {advice}"
            )


class Votes:
    """Lets all processes act on what one of them wants, at the same step.

    With several processes the answer is that of the call before: asking does not wait for the step
    that is under way, and every process hears the same at the same step.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: Any = 0

    def largest(self, wish: int) -> int:
        """The largest wish of a process; 0 where nobody wants anything."""
        if jax.process_count() == 1:
            return wish
        wishes = jax.make_array_from_callback(
            (self._size,), self._sharding, lambda _: np.full(1, wish, np.int32)
        )
        before, self._before = self._before, self._largest(wishes)
        return int(before)
