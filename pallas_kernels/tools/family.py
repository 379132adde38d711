"""What the tables, benchmarks and tests know of a family of kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from pallas_kernels.common.backend import Op
from pallas_kernels.tools import programs
from pallas_kernels.tools.programs import Shape

_Shape = TypeVar("_Shape", bound=Shape)


@dataclasses.dataclass(frozen=True)
class Family(Generic[_Shape]):
    """An op with the shapes that it is compiled, timed and tested at.

    Attributes:
      op: the public function.
      contract: its name and backends.
      shapes: those of published models, by name, and some that divide nothing; none where the
        family is in no table.
      representatives: one name of each kind of program, such as each kind of decay; whether a
        program compiles depends on its kind and hardly on lengths.
      has_kernels: whether it has Pallas kernels; without, XLA compiles it for every chip.
      slow_to_estimate: whether the TPU compiler would simulate the loops of its kernels for hours,
        or in more memory than there is, to give a static cost of a whole shape.
    """

    op: Callable[..., Any]
    contract: Op
    shapes: Mapping[str, _Shape]
    representatives: tuple[str, ...]
    has_kernels: bool = True
    slow_to_estimate: bool = False

    @property
    def name(self) -> str:
        return self.contract.name

    def named(self, name: str) -> _Shape:
        """The shape of that name.

        Raises:
          ValueError: no such name; the message lists them.
        """
        if name not in self.shapes:
            raise ValueError(f"shape={name!r} is unknown; one of {', '.join(self.shapes)}")
        return self.shapes[name]

    def case(
        self,
        shape: str | _Shape,
        implementation: str = "",
        mode: str = "forward",
        scale: str = "1",
        *options: str,
    ) -> tuple[Any, ...]:
        """`(fn, *operands)` of the op as a program, complex arrays as pairs, for `tools.aot`.

        Args:
          shape: a name, or a shape of your own.
          implementation: as the op's; "tpu", or "xla" where there are no kernels, if empty.
          mode: "forward" or "forward+backward".
          scale: factor on the length.
          *options: other arguments of the op, each as `name=value`, the value a string.

        All but a shape of your own are strings, so that a command line can give them.

        Raises:
          ValueError: unknown shape or mode, or what the op refuses.
        """
        chosen = self.named(shape) if isinstance(shape, str) else shape
        chosen = chosen if float(scale) == 1 else chosen.scaled(float(scale))
        given = dict(option.split("=", 1) for option in options)
        implementation = implementation or ("tpu" if self.has_kernels else "xla")
        op = functools.partial(self.op, implementation=implementation, **given)
        return programs.as_pairs(*programs.program(op, chosen, mode))
