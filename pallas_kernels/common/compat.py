"""The one door to Pallas: every import of `jax.experimental.pallas` is here.

Pallas moves fast. What differs between the supported versions of jax, what every call must say
(a cost estimate, an axis type under `shard_map`), and how a kernel is interpreted, is said here
once. `pl`, `tpu` and `triton` are Pallas' own modules, for what kernels use inside; `splash` is
attention that comes with JAX.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from pallas_kernels.common import symbolic

__all__ = [
    "interpreting",
    "match_vma",
    "out_struct",
    "pallas_call",
    "pl",
    "race_found",
    "splash",
    "tpu",
    "triton",
    "using_interpreter",
]

# Part of jax's trace cache: what is traced inside the context never runs outside, nor vice versa.
_interpreter = jax.make_user_context(default_value=None)


def interpreting() -> bool:
    """True inside `using_interpreter`: kernels of every backend then run on the host."""
    return _interpreter.value is not None


@contextlib.contextmanager
def using_interpreter(params: tpu.InterpretParams) -> Iterator[None]:
    """Interpret every kernel traced inside; `params` configure the TPU interpreter."""
    try:
        with _interpreter(params):
            yield
    finally:
        tpu.reset_tpu_interpret_mode_state()


def race_found() -> bool:
    """Whether the TPU interpreter saw two grid steps race in the last kernel it ran."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return bool(interpret_pallas_call.races and interpret_pallas_call.races.races_found)


def varying_axes(*arrays: Any) -> frozenset[Any]:
    """The mesh axes of an enclosing `jax.shard_map` over which any of the arrays varies."""
    axes: frozenset[Any] = frozenset()
    for array in arrays:
        aval = jax.typeof(array)
        axes |= aval.mat.varying if hasattr(aval, "mat") else getattr(aval, "vma", frozenset())
    return axes


def match_vma(*arrays: Any) -> tuple[Any, ...]:
    """The arrays (None stays None), all typed to vary over the axes that any of them varies over.

    `jax.shard_map(check_vma=True)` wants loops and kernels to agree on this type. The gradient of
    an array that was the same on all devices is summed over them.
    """
    axes = varying_axes(*(x for x in arrays if x is not None))

    def cast(x: Any) -> Any:
        missing = tuple(axes - varying_axes(x)) if x is not None else ()
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(map(cast, arrays))


def out_struct(shape: Sequence[int], dtype: Any, *like: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a kernel's output that varies over the mesh axes its inputs vary over.

    The name of this axis type differs between versions of jax.
    """
    axes = varying_axes(*like)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    if hasattr(jax.typeof(like[0]), "mat"):
        kind = jax.sharding.ManualAxisType(varying=axes)
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
    return jax.ShapeDtypeStruct(shape, dtype, vma=axes)  # type: ignore[call-arg]


def pallas_call(
    kernel: Callable[..., None],
    *,
    backend: Literal["tpu", "gpu"],
    name: str,
    out_shape: Any,
    grid: tuple[int, ...],
    in_specs: Any = pl.no_block_spec,
    out_specs: Any = pl.no_block_spec,
    scratch_shapes: Sequence[Any] = (),
    compiler_params: Any,
    flops: int,
) -> Callable[..., Any]:
    """`pl.pallas_call` with a cost estimate from its operands, interpreted where asked for."""

    def call(*operands: jax.Array) -> Any:
        moved = [*operands, *jax.tree.leaves(out_shape)]
        cost = pl.CostEstimate(
            flops=symbolic.known(flops, 0),
            transcendentals=0,
            bytes_accessed=symbolic.known(
                sum(math.prod(x.shape) * x.dtype.itemsize for x in moved), 0
            ),
        )
        # Pallas' TPU interpreter does not know Triton's loads; its generic one does.
        interpret = _interpreter.value if backend == "tpu" else interpreting()
        run = pl.pallas_call(
            kernel,
            out_shape=out_shape,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
            compiler_params=compiler_params,
            cost_estimate=cost,
            interpret=interpret or False,
            name=name,
        )
        # With jax_enable_x64 indices and counters would have 64 bits, which a TPU does not.
        with jax.enable_x64(False):
            return run(*operands)

    return call
