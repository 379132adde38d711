"""What is measured of the long convolution, and what it has to reach."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernels import results
from experiments.kernels.baselines import long_conv as baselines
from experiments.kernels.results import Result, Target
from experiments.kernels.timing import medians
from experiments.kernels.values import arguments
from pallas_kernels import long_conv, s4_kernel
from pallas_kernels.long_conv.api import METHODS
from pallas_kernels.long_conv.shapes import Shape, named
from pallas_kernels.tools.programs import program
from seqmodels.mixers import hippo

CASE = "pallas_kernels.long_conv.shapes:case"
BASELINE_CASE = "experiments.kernels.baselines.long_conv:case"
BOTH = ("forward", "forward+backward")
FASTEST = {"published fft": Target("at least", 1.0)}
CPU_SHAPE = Shape("cpu", "S4 at laptop size", 4, 2048, 64, two_sided=True)
SCALES = (0.5, 1.0, 2.0)
NO_PTXAS = "the family has no kernel of its own: XLA calls the platform's transform"


def describe(shape: Shape) -> str:
    kernel_size = f"{shape.kernel_size or shape.length} taps{' a side' * shape.two_sided}"
    return f"({shape.batch}, {shape.length}, {shape.width}) {kernel_size}, {shape.dtype}"


def timed(shape: Shape, mode: str, repetitions: int) -> Result:
    """Both methods here and now, against the baselines."""
    convs: dict[str, Any] = {name: functools.partial(long_conv, method=name) for name in METHODS}
    convs |= baselines.CONVS
    programs = {name: program(c, shape, mode)[0] for name, c in convs.items()}
    figures = medians(programs, arguments(long_conv, shape, mode), repetitions)
    best = min(figures[name] for name in METHODS)
    return Result(
        case=mode,
        device=jax.devices()[0].device_kind,
        kind=results.TIMED,
        shape=describe(shape),
        figures={f"{name} ms": value for name, value in figures.items()},
        ratios={name: value / best for name, value in figures.items()},
        targets=FASTEST,
    )


def cpu(repetitions: int, shape: Shape = CPU_SHAPE) -> Iterator[Result]:
    """At half the length, at it, at twice; one-sided; the kernel of S4."""
    for mode in BOTH:
        for scale in SCALES:
            yield timed(shape.scaled(scale), mode, repetitions)
        yield timed(Shape("one-sided", "SGConv", 4, 2048, 64), mode, repetitions)
    for sizes in KERNELS_OF_S4:
        for mode in BOTH:
            yield generated(mode, 1 if sizes == KERNELS_OF_S4[-1] else repetitions, *sizes)


# Width, states, length. At the last the einsum and its gradients hold arrays of 537 MB: once.
KERNELS_OF_S4 = ((64, 64, 4096), (256, 64, 16384))


def generated(mode: str, repetitions: int, width: int, states: int, length: int) -> Result:
    """The kernel of S4, from HiPPO-LegS, against the einsum over the whole Cauchy matrix."""
    rng = np.random.default_rng(0)
    values, vectors = hippo.normal_eigen(states)
    parts = values, hippo.normal_low_rank(vectors), hippo.normal_input(vectors)
    parameters = [np.tile(x, (width, 1)) for x in parts]
    c = rng.standard_normal((2, 1, width, states // 2))
    arrays = [jnp.asarray(x, jnp.complex64) for x in (*parameters, c[0] + 1j * c[1])]
    args = (jnp.asarray(np.geomspace(1e-3, 0.1, width), jnp.float32), *arrays)
    cotangent = jnp.asarray(rng.standard_normal((1, width, length)), jnp.float32)

    def forward_backward(op: Any, *args: Any) -> Any:
        kernel, pullback = jax.vjp(op, *args)
        return kernel, pullback(cotangent)

    def chosen(op: Any) -> Any:
        op = functools.partial(op, length=length)
        return op if mode == "forward" else functools.partial(forward_backward, op)

    programs = {"s4_kernel": chosen(s4_kernel), "einsum": chosen(baselines.cauchy_einsum)}
    times = medians(programs, args, repetitions)
    figures = {f"{name} ms": value for name, value in times.items()}
    for name, run in programs.items():
        memory: Any = jax.jit(run).lower(*args).compile().memory_analysis()
        figures[f"{name} MB of temporaries"] = memory.temp_size_in_bytes / 1e6
    return Result(
        case=f"{mode}, kernel of S4",
        device=jax.devices()[0].device_kind,
        kind=results.TIMED,
        shape=f"({width}, {length}) {states} states, float32",
        figures=figures,
        ratios={
            "einsum": times["einsum"] / times["s4_kernel"],
            "64 MB of temporaries": figures["s4_kernel MB of temporaries"] / 64,
        },
        targets={
            "einsum": Target("at least", 2.0),
            "64 MB of temporaries": Target("at most", 1.0),
        },
    )


TPU_SHAPES = ("s4-listops", "s4-text", "hyena-153m")


def tpu(chips: tuple[str, ...]) -> Iterator[Result]:
    """Both methods at published shapes, and the published form."""
    for chip in chips:
        for mode in BOTH:
            for name in TPU_SHAPES:
                for method in METHODS:
                    row = Result(f"{mode}, {method}", chip, results.STATIC, describe(named(name)))
                    yield results.estimated(row, CASE, name, "xla", mode, "1", f"method={method}")
            row = Result(
                f"{mode}, published fft", chip, results.STATIC, describe(named("s4-listops"))
            )
            yield results.estimated(row, BASELINE_CASE, "s4-listops", "published fft", mode)


GPU_SHAPES = ("s4-listops", "s4-text", "s4-pathx", "hyena-153m")


def gpu(repetitions: int, chips: tuple[str, ...]) -> Iterator[Result]:
    """Times on the GPU that is here; there is no kernel to read registers of."""
    for name in GPU_SHAPES:
        for mode in BOTH:
            if jax.default_backend() == "gpu":
                yield timed(named(name), mode, repetitions)
            else:
                yield results.no_gpu(mode, describe(named(name)))
    for chip in chips:
        yield Result("registers", chip, results.NOT_RUN, "any", figures={"reason": NO_PTXAS})
