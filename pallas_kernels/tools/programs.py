"""Ops as whole programs, with shapes instead of values: what `aot` compiles and benchmarks time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

MODES = ("forward", "forward+backward")
Struct = jax.ShapeDtypeStruct
Program = tuple[Callable[..., Any], tuple[Struct, ...]]
_Shape = TypeVar("_Shape")


def named(shapes: Mapping[str, _Shape], name: str) -> _Shape:
    """The entry of a family's `SHAPES`.

    Raises:
      ValueError: no such name; the message lists them.
    """
    if name not in shapes:
        raise ValueError(f"shape={name!r} is unknown; one of {', '.join(shapes)}")
    return shapes[name]


def chosen(shapes: Mapping[str, Any], shape: Any, scale: str) -> Any:
    """The shape that a family's `case` is asked for: a name of `shapes`, or a shape of your own.

    Its length is multiplied by `scale`, a string so that a command line can give it.
    """
    found = named(shapes, shape) if isinstance(shape, str) else shape
    return found if float(scale) == 1 else found.scaled(float(scale))


def program(forward: Callable[..., Any], operands: tuple[Struct, ...], mode: str) -> Program:
    """`(fn, operands)`: an op as one program, to jit and measure.

    Args:
      forward: a function of the operands whose first output is the one that a model goes on with;
        the others are states.
      operands: shapes and dtypes of its arguments.
      mode: "forward" is `forward` itself. "forward+backward" takes the cotangent of the first
        output as one more argument, the last, and returns that output and the gradients of all
        operands but integers, as a layer inside a larger program does.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; one of {', '.join(MODES)}")
    if mode == "forward":
        return forward, operands
    wanted = [jnp.issubdtype(x.dtype, jnp.inexact) for x in operands]

    def forward_backward(*operands_and_cotangent):
        *args, cotangent = operands_and_cotangent

        def output(*inexact):
            given = iter(inexact)
            return forward(*(next(given) if w else x for w, x in zip(wanted, args, strict=True)))[0]

        inexact = (x for w, x in zip(wanted, args, strict=True) if w)
        out, vjp = jax.vjp(output, *inexact)
        return out, vjp(cotangent)

    cotangent = jax.eval_shape(lambda *x: forward(*x)[0], *operands)
    return forward_backward, (*operands, Struct(cotangent.shape, cotangent.dtype))


def as_pairs(fn: Callable[..., Any], operands: tuple[Struct, ...]) -> tuple[Any, ...]:
    """`(fn, *operands)` with every complex array, in or out, replaced by `(real, imaginary)`.

    Splitting complex arrays at the border of a program costs more than a scan.
    """

    def split(x):
        return (x.real, x.imag) if jnp.iscomplexobj(x) else x

    def split_struct(x):
        if not jnp.issubdtype(x.dtype, jnp.complexfloating):
            return x
        return (Struct(x.shape, jnp.finfo(x.dtype).dtype),) * 2

    def wrapped(*parts):
        joined = [jax.lax.complex(*p) if isinstance(p, tuple) else p for p in parts]
        return jax.tree.map(split, fn(*joined))

    return wrapped, *map(split_struct, operands)
