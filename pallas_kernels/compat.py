"""The one door to Pallas: every import of `jax.experimental.pallas` is here.

Pallas moves fast. What differs between the supported versions of jax, what every call must say
(a cost estimate, an axis type under `shard_map`), and how a kernel is interpreted, is said here
once. `pl`, `tpu` and `triton` are Pallas' own modules, for what kernels use inside.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

__all__ = [
    "interpreting",
    "out_struct",
    "pallas_call",
    "pl",
    "race_found",
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


def out_struct(shape: Sequence[int], dtype: Any, *like: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a kernel's output that varies over the mesh axes its inputs vary over.

    `jax.shard_map(check_vma=True)` wants this axis type; its name differs between versions.
    """
    types = [jax.typeof(x) for x in like]
    if types and hasattr(types[0], "mat"):
        varying = frozenset().union(*(t.mat.varying for t in types))
        if not varying:
            return jax.ShapeDtypeStruct(shape, dtype)
        return jax.ShapeDtypeStruct(
            shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying)
        )
    varying = frozenset().union(*(getattr(t, "vma", frozenset()) for t in types))
    return jax.ShapeDtypeStruct(shape, dtype, vma=varying or None)  # type: ignore[call-arg]


def pallas_call(
    kernel: Callable[..., None],
    *,
    backend: Literal["tpu", "gpu"],
    name: str,
    out_shape: Any,
    grid: tuple[int, ...],
    in_specs: Any = pl.no_block_spec,
    out_specs: Any = pl.no_block_spec,
    compiler_params: Any,
    flops: int,
) -> Callable[..., Any]:
    """`pl.pallas_call` with a cost estimate from its operands, interpreted where asked for."""

    def call(*operands: jax.Array) -> Any:
        moved = [*operands, *jax.tree.leaves(out_shape)]
        cost = pl.CostEstimate(
            flops=flops,
            transcendentals=0,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        )
        # Pallas' TPU interpreter does not know Triton's loads; its generic one does.
        interpret = _interpreter.value if backend == "tpu" else interpreting()
        run = pl.pallas_call(
            kernel,
            out_shape=out_shape,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            compiler_params=compiler_params,
            cost_estimate=cost,
            interpret=interpret or False,
            name=name,
        )
        with warnings.catch_warnings():
            # Deprecated since jax 0.11, still the lowering that runs on every GPU since Ampere.
            warnings.filterwarnings("ignore", "(?i).*triton.*", DeprecationWarning)
            return run(*operands)

    return call
