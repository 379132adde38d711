"""Ops as whole programs, with shapes instead of values: what `aot` compiles and benchmarks time."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

MODES = ("forward", "forward+backward")
Struct = jax.ShapeDtypeStruct
Program = tuple[Callable[..., Any], tuple[Struct, ...]]
_Own = TypeVar("_Own", bound="Shape")  # typing.Self, which the tests' type checker refuses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One use of an op; a family adds its sizes and flags.

    Attributes:
      name: what tests and commands call it.
      source: the model and where its numbers are published.
      batch, length: B and L, rows and tokens in a row.
    """

    name: str
    source: str
    batch: int
    length: int

    def operands(self) -> dict[str, Struct]:
        """The op's arrays by the name of the argument, in the program's order."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The op's other arguments, which are static."""
        return {}

    def scaled(self: _Own, factor: float) -> _Own:
        """The same with another length."""
        length = max(1, round(self.length * factor))
        return dataclasses.replace(self, name=f"{self.name} x{factor:g}", length=length)


def program(op: Callable[..., Any], shape: Shape, mode: str) -> Program:
    """`(fn, operands)`: an op as one program, to jit and measure.

    Args:
      op: called with `shape.operands()` and `shape.options()` by name. Its first output, or its
        only one, is the one that a model goes on with; the others are states.
      shape: of the arrays.
      mode: "forward" gives all outputs, as a tuple. "forward+backward" takes the cotangent of the
        first output as one more argument, the last, and returns that output and the gradients of
        all operands but integers, as a layer inside a larger program does.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; one of {', '.join(MODES)}")
    named, options = shape.operands(), shape.options()
    operands = tuple(named.values())

    def forward(*args):
        outputs = op(**dict(zip(named, args, strict=True)), **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

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


def fingerprint(fn: Callable[..., Any], *operands: Any) -> str:
    """Digest of the program that `fn` is traced to, kernels included, for the installed jax.

    Names of functions and kernels do not count: a program that was only moved or renamed keeps its
    fingerprint.

    Args:
      fn: any function of pytrees of arrays.
      *operands: arrays or `jax.ShapeDtypeStruct`s.
    """
    text = re.sub(r"\bname=[^\s\]]+", "", str(jax.make_jaxpr(fn)(*operands)))
    return hashlib.sha256(f"{jax.__version__} {text}".encode()).hexdigest()[:16]


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
