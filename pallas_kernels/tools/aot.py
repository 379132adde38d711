"""Compile for TPUs and NVIDIA GPUs that are not there, and read what their compilers say.

    compile_for("v5e", fn, *shapes)          in this process: does it compile, what does it contain
    estimate("v5e", "module:case")           static cost on a TPU: time, HBM traffic, layout copies
    report("h100", "module:case")            registers, spills and shared memory of GPU kernels
    each("v5e", "module:case", [[...], ...]) one of these for many arguments
    python -m pallas_kernels.tools.aot module:case [argument ...] --chip v5e

A case is a function of strings that returns `(fn, *shapes)`. Every family has one, such as
`pallas_kernels.linear_scan.shapes:case`, which is its `Family.case`: a named shape, then if wanted
an implementation, "forward" or "forward+backward", a factor on the length, and more options of the
op as `name=value`. `estimate`, `report` and `each` run it in another process,
because the compilers write their dumps only if told so before jax starts.

The compilers come with `pip install seqmodels[aot]`; no device and no driver is needed. What they
say is a model, not a measurement: quote it as "static estimate by the TPU compiler".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend.core import jaxpr_as_fun

from pallas_kernels.common import compat, dispatch
from pallas_kernels.tools import hlo


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU by its data sheet: `clock` in GHz, HBM `bandwidth` in GB/s, of one device of jax."""

    topology: str
    clock: float
    bandwidth: int


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU by its data sheet.

    `capability` is (major, minor), `shared` bytes of shared memory of a multiprocessor, `l2` bytes,
    `bandwidth` GB/s, `clock` GHz, `memory` GB.
    """

    model: str
    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    l2: int
    bandwidth: int
    clock: float
    memory: int

    @property
    def target_config(self) -> str:
        """What XLA wants to know, as a text-format `GpuTargetConfigProto`."""
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": 2048,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_block_optin": self.shared - 1024,
            "shared_memory_per_core": self.shared,
            "core_count": self.multiprocessors,
            "fpus_per_core": 128,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "memory_bandwidth": self.bandwidth * 10**9,
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory * 10**9,
        }
        fields = " ".join(f"{key}: {value}" for key, value in info.items())
        major, minor = self.capability
        return (
            f"gpu_device_info {{ {fields} "
            f"cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            f'platform_name: "CUDA" device_description_str: "{self.model}" '
            "dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }"
        )


# fmt: off
TPUS = {
    "v5e": Tpu("v5e:2x2", 1.50, 819),
    "v5p": Tpu("v5p:2x2x1", 1.75, 2765),
    "v6e": Tpu("v6e:2x2", 1.75, 1640),
    "tpu7x": Tpu("tpu7x:2x2x1", 1.90, 3690),  # a device is half a chip; the clock is assumed
}
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 164 * 1024, 40 * 2**20, 2039, 1.410, 85),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 228 * 1024, 50 * 2**20, 3350, 1.980, 85),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 228 * 1024, 60 * 2**20, 4800, 1.980, 150),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 228 * 1024, 126 * 2**20, 8000, 1.965, 191),
}
# fmt: on
CHIPS: dict[str, Tpu | Gpu] = {**TPUS, **GPUS}
_WORKER_MEMORY = 10 * 2**30  # bytes of addresses


def missing(chip: str) -> str | None:
    """What has to be installed before anything compiles for `chip`; None if nothing.

    Raises:
      ValueError: unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r} is unknown; one of {', '.join(CHIPS)}")
    if chip in TPUS:
        absent = [] if importlib.util.find_spec("libtpu") else ["libtpu"]
    else:
        plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
        absent = [] if any(map(importlib.util.find_spec, plugins)) else [plugins[0]]
        absent += [] if _ptxas() else ["nvidia-cuda-nvcc (ptxas)"]
    if not absent:
        return None
    return f"compiling for {chip} needs {' and '.join(absent)}: pip install 'seqmodels[aot]'"


def topology(chip: str, layout: str | None = None) -> Any:
    """`jax.experimental.topologies.TopologyDescription` of absent devices.

    Args:
      chip: a key of `CHIPS`.
      layout: how many TPU chips, such as "16x16" on v5e or "8x8x8" on v5p; by default few.

    Raises:
      ValueError: unknown chip.
      ImportError: its compiler is not installed; the message says how to get it.
    """
    if reason := missing(chip):
        raise ImportError(reason)
    return _topology(chip, layout)


@functools.cache
def _topology(chip: str, layout: str | None) -> Any:
    if chip in GPUS:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip,
            topology="1x1x1",
            target_config=GPUS[chip].target_config,
        )
    name = TPUS[chip].topology if layout is None else f"{chip}:{layout}"
    # Without these libtpu looks for the metadata server of a TPU VM, and admits one process.
    with _environment(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"):
        return topologies.get_topology_desc(platform="tpu", topology_name=name)


@contextlib.contextmanager
def _environment(**defaults: str) -> Iterator[None]:
    """Environment variables that are not set, set while inside."""
    added = {key: value for key, value in defaults.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def compile_for(chip: str, fn: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """`jit(fn)(*args)` compiled for one device of `chip`; errors are the compiler's own.

    Args:
      chip: a key of `CHIPS`.
      fn: any function of pytrees of arrays.
      *args: arrays or `jax.ShapeDtypeStruct`s; values are not looked at.

    Raises:
      ValueError, ImportError: see `topology`.
    """
    sharding = jax.sharding.SingleDeviceSharding(topology(chip).devices[0])

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with _lowering(chip):
        lowered = jax.jit(fn).lower(*jax.tree.map(place, args))
    return lowered.compile()


@contextlib.contextmanager
def _lowering(chip: str) -> Iterator[None]:
    """What jax wants around the lowering of a program for an absent `chip`."""
    device = topology(chip).devices[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.only_for(device.platform))
        if chip in GPUS:
            stack.enter_context(warnings.catch_warnings())
            # Deprecated since jax 0.11, still the lowering for every GPU since Ampere.
            warnings.filterwarnings(
                "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
            )
        if chip in GPUS and jax.__version_info__ >= (0, 11):
            # Pallas asks for the GPU's kind and cores, and there is no device to ask.
            kind = jax.sharding.AbstractDevice(device.device_kind, device.core_count, "cuda")
            mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        yield


def kernel_bytes(fn: Callable[..., Any], *args: Any) -> int | None:
    """HBM bytes that the TPU kernels in `fn` move by their block specs.

    Blocks times changes of their index over the grid: what a kernel reads twice counts twice. None
    if it depends on data (scalar prefetch). Needs no compiler.
    """
    moved = [_call_bytes(call) for call in _tpu_calls(jax.make_jaxpr(fn)(*args).jaxpr)]
    if any(m is None for m in moved):
        return None
    return sum(m for m in moved if m is not None)


def _tpu_calls(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            if isinstance(equation.params["compiler_params"], compat.tpu.CompilerParams):
                yield equation
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _tpu_calls(inner)


def _call_bytes(call: Any) -> int | None:
    mapping = call.params["grid_mapping"]
    if mapping.num_index_operands:
        return None
    grid = np.indices(mapping.grid).reshape(len(mapping.grid), -1).astype(np.int32)
    total = 0
    for block in mapping.block_mappings:
        index = jax.vmap(jaxpr_as_fun(block.index_map_jaxpr))(*grid)
        index = np.stack([np.broadcast_to(i, grid.shape[1:]) for i in index])
        moves = np.r_[True, (np.diff(index) != 0).any(0)]
        sizes = np.array([getattr(s, "block_size", 1) for s in block.block_shape])[:, None]
        extents = np.array(block.array_aval.shape)[:, None]
        inside = np.clip(extents - index * sizes, 0, sizes)
        total += int(inside.prod(0, where=True)[moves].sum()) * block.array_aval.dtype.itemsize
    return total


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Static cost of a program on one TPU device; times in microseconds.

    Attributes:
      cycles, static_us: the compiler's own schedule, summed over all ops. Loops and branches on
        program ids are followed; branches on data can count as not taken. Transfers are modelled
        optimistically, hence the next ones.
      traffic_bytes: what the compiled program's ops read and write in HBM, operands and results of
        each once; what XLA keeps in VMEM between two ops is not counted.
      kernel_bytes: what the Pallas kernels move by their block specs (see `kernel_bytes`).
      floor_bytes, floor_us: every input and output once.
      us: the largest of static time, traffic and kernel bytes over the bandwidth.
      times_floor: `us / floor_us`; 1 cannot be beaten.
      temp_bytes: HBM besides inputs and outputs.
      layout_copies: bytes that each copy to another layout or transpose outside the kernels writes.
      kernels: number of Pallas kernels.
      ops: cycles of the most expensive ops.
    """

    chip: str
    cycles: int
    static_us: float
    traffic_bytes: int
    kernel_bytes: int | None
    floor_bytes: int
    floor_us: float
    us: float
    times_floor: float
    temp_bytes: int
    layout_copies: dict[str, int]
    kernels: int
    ops: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One GPU kernel as ptxas sees it; all but `registers` (a thread) in bytes."""

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def estimate(chip: str, case: str, *arguments: str) -> Estimate:
    """Static cost on a TPU of the `(fn, *shapes)` that `case` returns for `arguments`.

    Args:
      chip: a key of `TPUS`.
      case: "package.module:function".
      *arguments: strings, given to the function.

    Raises:
      ValueError: no TPU, or a program that compiles but whose cost cannot be read, such as one with
        a loop or branch outside its kernels.
      ImportError: libtpu is not installed.
      RuntimeError: the case does not compile; the compiler's message is in it.
    """
    if chip not in TPUS:
        raise ValueError(f"chip={chip!r}: static costs are for {', '.join(TPUS)}; see report")
    return _only(each(chip, case, [arguments]))


def report(chip: str, case: str, *arguments: str) -> list[Kernel]:
    """What ptxas says of each GPU kernel of a case; arguments and errors as in `estimate`."""
    if chip not in GPUS:
        raise ValueError(f"chip={chip!r}: kernel reports are for {', '.join(GPUS)}; see estimate")
    return _only(each(chip, case, [arguments]))


def each(chip: str, case: str, argument_lists: Iterable[Sequence[str]]) -> Iterator[Any]:
    """`estimate` (on a TPU) or `report` (on a GPU) of several argument lists, as they are done.

    One process serves them all, because to start one takes longer than most compilations. What
    cannot be estimated is yielded as the error that `estimate` or `report` would raise: a
    ValueError where it compiles and only its cost cannot be read.

    Raises:
      ValueError, ImportError: as `estimate`.
    """
    if reason := missing(chip):
        raise ImportError(reason)
    if ":" not in case:
        raise ValueError(f"case={case!r} must be 'package.module:function'")
    waiting = [list(arguments) for arguments in argument_lists]
    yield from _each(chip, case, waiting, read=True)


def _each(chip: str, case: str, waiting: list[list[str]], *, read: bool) -> Iterator[Any]:
    """`each`; without `read` only compiles, and yields None where that succeeds."""
    while waiting:
        with tempfile.TemporaryDirectory() as directory:
            errors = Path(directory, "errors")
            with (
                errors.open("w") as stderr,
                _worker(chip, case, waiting, directory, stderr, read=read) as run,
            ):
                try:
                    for line in run.stdout or ():
                        if line.startswith("{"):
                            waiting.pop(0)
                            yield _answer(chip, json.loads(line))
                finally:
                    run.kill()  # nobody may be listening any more
            if not waiting:
                return
            arguments = waiting.pop(0)
            said = errors.read_text(errors="replace").strip()
            fatal = re.search(r"^F\d{4} .*? \S+\] (.*)", said, re.MULTILINE)
            reason = fatal[1] if fatal else said[-4000:]
            # What reads the cost may fail where the compiler does not.
            if read and [*_each(chip, case, [arguments], read=False)] == [None]:
                yield ValueError(f"it compiles, but its cost cannot be read: {reason}")
            else:
                yield RuntimeError(f"{case} {arguments} ended its process:\n{reason}")


def _only(answers: Iterator[Any]) -> Any:
    [answer] = answers
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(chip: str, reply: dict[str, Any]) -> Any:
    if "unreadable" in reply:
        return ValueError(reply["unreadable"])
    if "error" in reply:
        return RuntimeError(reply["error"])
    if reply["result"] is None:
        return None
    if chip in TPUS:
        return Estimate(**reply["result"])
    return [Kernel(**kernel) for kernel in reply["result"]]


def _worker(
    chip: str,
    case: str,
    argument_lists: list[list[str]],
    directory: str,
    stderr: IO[str],
    *,
    read: bool,
) -> subprocess.Popen[str]:
    """A process that prints a line of JSON for each argument list."""
    variable, flag = (
        ("LIBTPU_INIT_ARGS", "--xla_jf_dump_static_llo_profile_to")
        if chip in TPUS
        # Since jax 0.11 PTX is not dumped unless all emitters are asked to.
        else ("XLA_FLAGS", "--xla_dump_emitter_re=.* --xla_dump_to")
    )
    dump, task = Path(directory, "dump"), Path(directory, "task.json")
    task.write_text(json.dumps(argument_lists))
    environment = os.environ | {
        variable: f"{os.environ.get(variable, '')} {f'{flag}={dump}' if read else ''}",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is cached is not dumped
        # Dumping the emitters' steps names addresses again and again: half of the time, unread.
        "LLVM_DISABLE_SYMBOLIZATION": "1",
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
    }
    command = [sys.executable, "-m", "pallas_kernels.tools.aot", case, "--chip", chip]
    dumping = ["--dump", str(dump)] if read else []
    return subprocess.Popen(
        [*command, "--task", str(task), *dumping],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def _work(chip: str, case: str, task: Path, dump: Path | None) -> None:
    """What the process of `_worker` does; without `dump` it only compiles."""
    module, _, name = case.partition(":")
    function = getattr(importlib.import_module(module), name)
    if chip in TPUS and dump:
        # The static profile of some programs takes all the memory there is; the compiler does not.
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY, hard))
    here = _estimate_here if chip in TPUS else _report_here
    for arguments in json.loads(task.read_text()):
        reply: dict[str, Any] = {"result": None}
        try:
            fn, *shapes = function(*arguments)
            if dump is None:
                compile_for(chip, fn, *shapes)
            else:
                shutil.rmtree(dump, ignore_errors=True)
                dump.mkdir()
                result = here(chip, dump, fn, *shapes)
                plain = [*map(vars, result)] if isinstance(result, list) else vars(result)
                reply = {"result": plain}
        except hlo.Unreadable as error:
            reply = {"unreadable": str(error)}
        except Exception:
            reply = {"error": f"{case} {arguments} failed:\n{traceback.format_exc()[-4000:]}"}
        print(json.dumps(reply), flush=True)
        jax.clear_caches()


def _estimate_here(chip: str, dump: Path, fn: Callable[..., Any], *shapes: Any) -> Estimate:
    compiled = compile_for(chip, fn, *shapes)
    program = hlo.parse(compiled.as_text() or "")
    ops: dict[str, int] = {}
    for path in dump.rglob("*"):
        if path.is_file():
            entries = re.findall(
                r'hlo_op_name: "(.*?)"\s+estimated_cycles: (\d+)', path.read_text(errors="replace")
            )
            for name, cycles in entries:
                ops[name] = ops.get(name, 0) + int(cycles)
    if not ops:
        raise RuntimeError("the TPU compiler wrote no static profile: is the program empty?")
    leaves = jax.tree.leaves((shapes, jax.eval_shape(fn, *shapes)))
    floor = sum(x.size * x.dtype.itemsize for x in leaves)
    traffic, kernels = program.traffic(), kernel_bytes(fn, *shapes)
    tpu, cycles = TPUS[chip], sum(ops.values())
    static_us = cycles / tpu.clock / 1e3
    us = max(static_us, *(x / tpu.bandwidth / 1e3 for x in (traffic, kernels or 0)))
    floor_us = floor / tpu.bandwidth / 1e3
    memory = compiled.memory_analysis()
    return Estimate(
        chip=chip,
        cycles=cycles,
        static_us=static_us,
        traffic_bytes=traffic,
        kernel_bytes=kernels,
        floor_bytes=floor,
        floor_us=floor_us,
        us=us,
        times_floor=us / floor_us,
        temp_bytes=memory.temp_size_in_bytes if memory else 0,
        layout_copies=program.layout_copies(),
        kernels=program.kernels(),
        ops=dict(sorted(ops.items(), key=lambda item: -item[1])[:10]),
    )


def _report_here(chip: str, dump: Path, fn: Callable[..., Any], *shapes: Any) -> list[Kernel]:
    compile_for(chip, fn, *shapes)
    kernels = []
    for path in sorted(dump.rglob("*.ptx")):
        source = path.read_text()
        if ".entry" in source:
            target = re.search(r"\.target (sm_\w+)", source)
            kernels += _ptxas_report(path, target[1] if target else "")
    if not kernels:
        raise RuntimeError("the GPU compiler wrote no PTX: is the program empty?")
    return kernels


def _ptxas_report(path: Path, architecture: str) -> list[Kernel]:
    done = subprocess.run(
        [str(_ptxas()), "-v", f"-arch={architecture}", str(path), "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"ptxas refuses {path.name}: {done.stderr[-2000:]}")

    def number(pattern: str, text: str) -> int:
        found = re.search(rf"(\d+) {pattern}", text)
        return int(found[1]) if found else 0

    kernels = []
    for text in done.stderr.split("Compiling entry function ")[1:]:
        used = re.search(r"Used (\d+) registers", text)
        kernels.append(
            Kernel(
                name=text.split("'")[1],
                registers=int(used[1]) if used else 0,
                stack=number("bytes stack frame", text),
                spill_stores=number("bytes spill stores", text),
                spill_loads=number("bytes spill loads", text),
                shared=number("bytes smem", text),
            )
        )
    return kernels


def _ptxas() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return next((p for place in places for p in sorted(Path(place).rglob("bin/ptxas"))), None)


def main() -> None:
    """The command line; with `--task` it is the process that `each` starts."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tools.aot",
        description="Static cost of a case on an absent TPU, or ptxas' report of its GPU kernels.",
        epilog="example: python -m pallas_kernels.tools.aot pallas_kernels.linear_scan.shapes:case "
        "recurrentgemma-2b tpu forward --chip v5e",
    )
    parser.add_argument("case", help="package.module:function that returns (fn, *shapes)")
    parser.add_argument("arguments", nargs="*", help="strings, given to the function")
    parser.add_argument("--chip", choices=CHIPS, default="v5e", help="default: %(default)s")
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        _work(args.chip, args.case, args.task, args.dump)
        return
    result = _only(each(args.chip, args.case, [args.arguments]))
    plain = [*map(vars, result)] if isinstance(result, list) else vars(result)
    print(json.dumps(plain, indent=2))


if __name__ == "__main__":
    main()
