"""How the parameters of a model lie in the tensors of a checkpoint."""

import dataclasses
from collections.abc import Mapping

import numpy as np

_CONVOLUTIONS = ("conv", "conv1d", "conv_1d", "q_conv", "k_conv", "v_conv")


@dataclasses.dataclass(frozen=True)
class Join:
    """A tensor that holds several of our parameters, along the axis of their outputs.

    Attributes:
      theirs: its name; ``{}`` is a layer's number.
      ours: the parameters' paths, written as in ``Family.names``, in their order.
      groups: the outputs are so many groups, such as heads, each with a share of every parameter.
    """

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor of a checkpoint: the parameters in it, with their shapes in its layout.

    Attributes:
      parts: our paths -> shapes, in order.
      groups: as in ``Join``.
    """

    parts: Mapping[str, tuple[int, ...]]
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def split(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters in a tensor, each in our layout."""
        if len(self.parts) == 1:
            return {ours: to_ours(ours, tensor) for ours in self.parts}
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        sizes = [shape[0] // self.groups for shape in self.parts.values()]
        pieces = np.split(grouped, np.cumsum(sizes)[:-1], axis=1)
        return {
            ours: to_ours(ours, piece.reshape(shape))
            for (ours, shape), piece in zip(self.parts.items(), pieces, strict=True)
        }

    def join(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of ``split``."""
        pieces = [to_theirs(ours, arrays[ours]) for ours in self.parts]
        if len(pieces) == 1:
            return pieces[0]
        grouped = [piece.reshape(self.groups, -1, *piece.shape[1:]) for piece in pieces]
        return np.concatenate(grouped, axis=1).reshape(self.shape)


def to_theirs(path: str, array: np.ndarray) -> np.ndarray:
    """A parameter in torch's layout: outputs first; ``(D, 1, W)`` of a convolution."""
    *_, module, leaf = path.split("/")
    if leaf != "kernel":
        return array
    return array.T[:, None] if module in _CONVOLUTIONS else array.T


def to_ours(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of ``to_theirs``."""
    *_, module, leaf = path.split("/")
    if leaf != "kernel":
        return array
    return array[:, 0].T if module in _CONVOLUTIONS else array.T
