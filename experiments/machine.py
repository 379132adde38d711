"""What JAX has on this machine: versions, devices, settings, and the usual traps."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import seqmodels

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
"""What lets JAX use an accelerator; none is needed for CPUs."""

VARIABLES = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "CUDA_VISIBLE_DEVICES",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "JAX_COMPILATION_CACHE_DIR",
)
OPTIONS = (
    "jax_enable_x64",
    "jax_disable_jit",
    "jax_debug_nans",
    "jax_default_matmul_precision",
    "jax_numpy_rank_promotion",
)

GOOGLE = "0x1ae0"
TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
"""PCI ids of Google and of its TPUs, v2 to 7x."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that JAX sees.

    Attributes:
      name: "cpu:0".
      kind: what its vendor calls it.
      memory: bytes that JAX may take, of a CPU those of the machine; None if nobody says.
      capability: compute capability of an NVIDIA GPU.
    """

    name: str
    kind: str
    memory: int | None
    capability: str | None = None


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
      versions: of Python and of packages; None of those that are not installed.
      backend: "cpu", "gpu" or "tpu", what JAX runs programs on unless told otherwise; None if it
        has none.
      devices: those of the backend.
      variables: of the environment, those of ``VARIABLES`` that are set.
      options: JAX's, those of ``OPTIONS`` that differ from its defaults.
      has_gpu, has_tpu: what the system shows, whether or not JAX can use it.
      problem: why JAX has no backend.
    """

    versions: Mapping[str, str | None]
    backend: str | None
    devices: tuple[Device, ...]
    variables: Mapping[str, str]
    options: Mapping[str, Any]
    has_gpu: bool = False
    has_tpu: bool = False
    problem: str | None = None


def inspect() -> Machine:
    """This machine; the first call of JAX's devices is in here."""
    problem, devices = None, []
    try:
        devices = jax.devices()
    except RuntimeError as error:
        problem = " ".join(str(error).split())
    return Machine(
        versions={
            "seqmodels": seqmodels.__version__,
            "python": platform.python_version(),
            **{name: installed(name) for name in (*LIBRARIES, *PLUGINS)},
        },
        backend=None if problem else jax.default_backend(),
        devices=tuple(map(_device, devices)),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        options=_options(),
        has_gpu=Path("/proc/driver/nvidia/version").exists() or bool(shutil.which("nvidia-smi")),
        has_tpu=_has_tpu(),
        problem=problem,
    )


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: jax.Device) -> Device:
    try:
        memory = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        memory = None
    if device.platform == "cpu":
        memory = _installed_memory()
    capability = getattr(device, "compute_capability", None)
    return Device(
        f"{device.platform}:{device.id}",
        device.device_kind,
        memory,
        None if capability is None else str(capability),
    )


def _installed_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _has_tpu() -> bool:
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            device = vendor.with_name("device").read_text().strip()
            if vendor.read_text().strip() == GOOGLE and device in TPUS:
                return True
        except OSError:
            continue
    return False


def _options() -> dict[str, Any]:
    usual = {"jax_default_matmul_precision": None, "jax_numpy_rank_promotion": "allow"}
    found = {name: getattr(jax.config, name) for name in OPTIONS}
    return {name: value for name, value in found.items() if value != usual.get(name, False)}


def traps(machine: Machine) -> Iterator[str]:
    """What often goes wrong, and does here: each what it is, what follows, and the remedy."""
    plugins = [name for name in PLUGINS if machine.versions.get(name)]
    cuda = [name for name in plugins if "cuda" in name]
    if machine.problem:
        yield f"JAX has no device: {machine.problem}"
    if machine.backend == "cpu" and "JAX_PLATFORMS" in machine.variables:
        if machine.has_gpu or machine.has_tpu:
            yield (
                f"JAX_PLATFORMS={machine.variables['JAX_PLATFORMS']} keeps JAX from this machine's "
                "accelerator; unset it"
            )
    elif machine.backend == "cpu" and machine.has_gpu:
        yield "this machine has an NVIDIA GPU, and JAX runs on its CPU: " + (
            f"{cuda[0]} is installed but finds no GPU; see that nvidia-smi works, that the driver "
            "is new enough and that CUDA_VISIBLE_DEVICES hides nothing"
            if cuda
            else "jaxlib alone is for CPUs; pip install 'seqmodels[cuda]'"
        )
    elif machine.backend == "cpu" and machine.has_tpu:
        yield "this machine has a TPU, and JAX runs on its CPU: " + (
            "libtpu is installed; see that no other process holds the TPU"
            if "libtpu" in plugins
            else "pip install 'seqmodels[tpu]'"
        )
    jax_version, jaxlib = machine.versions.get("jax"), machine.versions.get("jaxlib")
    for name, version in [("jaxlib", jaxlib), *((name, machine.versions[name]) for name in cuda)]:
        if version != jax_version:
            yield f"{name} {version} and jax {jax_version} are not of one version; install the same"
    for device in machine.devices:
        if device.capability and float(device.capability) < 8.0:
            yield (
                f"{device.name} has compute capability {device.capability}, the kernels need 8.0: "
                "the portable path runs in their place"
            )
    yield from _costly_settings(machine)


def _costly_settings(machine: Machine) -> Iterator[str]:
    if machine.options.get("jax_enable_x64"):
        yield (
            "jax_enable_x64 is on: arrays without a dtype are float64, which no kernel takes and "
            "no TPU computes quickly"
        )
    if machine.options.get("jax_disable_jit"):
        yield "jax_disable_jit is on: every operation runs by itself, many times slower"
    if machine.options.get("jax_debug_nans"):
        yield "jax_debug_nans is on: every result is waited for and looked at"
    allocation = {"XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"}
    if machine.backend == "gpu" and not allocation & machine.variables.keys():
        share = machine.variables.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
        yield (
            f"JAX takes {share} of a GPU's memory when it starts: a second process beside it has "
            "none left, and nvidia-smi shows it as used. XLA_PYTHON_CLIENT_PREALLOCATE=false takes "
            "it as it is needed"
        )
