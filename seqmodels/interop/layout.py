"""How the parameters of a model lie in the tensors of a checkpoint."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

_EXPERTS = ("w_gate", "w_in", "w_out")
_CONVOLUTIONS = ("conv", "conv1d", "conv_1d", "q_conv", "k_conv", "v_conv")


@dataclasses.dataclass(frozen=True)
class Join:
    """A tensor that holds several of our parameters, along the axis of their outputs.

    Attributes:
      theirs: its name; ``{}`` is a layer's number.
      ours: the parameters' paths, written as in ``Family.names``, in their order.
      groups: the outputs are so many groups, such as heads, each with a share of every parameter.
      stacked: the groups, such as experts, have an axis of their own in front.
    """

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor of a checkpoint: the parameters in it, with their shapes in its layout.

    Attributes:
      parts: our paths -> shapes, in order.
      groups, stacked: as in ``Join``.
    """

    parts: Mapping[str, tuple[int, ...]]
    groups: int = 1
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, its outputs summed over the parameters in it."""
        first, *others = self.parts.values()
        axis = int(self.stacked)
        if not others:
            return first
        outputs = first[axis] + sum(shape[axis] for shape in others)
        return (*first[:axis], outputs, *first[axis + 1 :])

    def split(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters in a tensor, each in our layout."""
        if len(self.parts) == 1:
            return {ours: to_ours(ours, tensor) for ours in self.parts}
        sizes = [self._grouped(np.broadcast_to(0, shape)).shape[1] for shape in self.parts.values()]
        pieces = np.split(self._grouped(tensor), np.cumsum(sizes)[:-1], axis=1)
        return {
            ours: to_ours(ours, piece.reshape(shape))
            for (ours, shape), piece in zip(self.parts.items(), pieces, strict=True)
        }

    def join(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of ``split``."""
        pieces = [to_theirs(ours, arrays[ours]) for ours in self.parts]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([self._grouped(p) for p in pieces], axis=1).reshape(self.shape)

    def _grouped(self, array: np.ndarray) -> np.ndarray:
        """``(groups, outputs of a group, ..)``."""
        return array if self.stacked else array.reshape(self.groups, -1, *array.shape[1:])


def to_theirs(path: str, array: np.ndarray) -> np.ndarray:
    """A parameter in torch's layout: outputs first; ``(D, 1, W)`` of a convolution."""
    *_, module, leaf = path.split("/")
    if leaf in _EXPERTS:
        return np.swapaxes(array, -1, -2)
    if leaf != "kernel":
        return array
    return array.T[:, None] if module in _CONVOLUTIONS else array.T


def to_ours(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of ``to_theirs``."""
    *_, module, leaf = path.split("/")
    if leaf in _EXPERTS:
        return np.swapaxes(array, -1, -2)
    if leaf != "kernel":
        return array
    return array[:, 0].T if module in _CONVOLUTIONS else array.T


def experts_apart(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path, those of experts one by one: ``w_in`` -> ``expert_0/w_in``, ..."""
    apart: dict[str, Any] = {}
    for path, array in flat.items():
        module, _, leaf = path.rpartition("/")
        if leaf in _EXPERTS:
            apart |= {f"{module}/expert_{i}/{leaf}": part for i, part in enumerate(array)}
        else:
            apart[path] = array
    return apart


def experts_together(
    parts: Iterable[tuple[str, np.ndarray]], experts: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of ``experts_apart``, one by one: of experts once the last has come.

    Args:
      parts: paths and arrays; those of ``expert_{i}`` for ``experts`` numbers, in any order.
      experts: how many there are in each layer.
    """
    waiting: dict[str, dict[int, np.ndarray]] = {}
    for path, array in parts:
        found = re.fullmatch(r"(.*)/expert_(\d+)/(.*)", path)
        if found is None:
            yield path, array
            continue
        module, number, leaf = found.groups()
        whole = f"{module}/{leaf}"
        apart = waiting.setdefault(whole, {})
        apart[int(number)] = array
        if len(apart) == experts:
            yield whole, np.stack([apart.pop(i) for i in range(experts)])
