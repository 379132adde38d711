"""`jax.shard_map` of ops: each device has its rows, its part of their length, its channels.

The compiler partitions XLA programs by itself, but not Pallas kernels, and it knows no exchange of
states: so an operator stands inside `jax.shard_map`, and that is done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels.common import compat
from seqmodels.parallel.mesh import current_mesh, model_parts, shards_of

ROWS = PartitionSpec("data")
TOKENS = PartitionSpec("data", "seq")

Arrays = Mapping[str, Any]


class Channels(NamedTuple):
    """Heads or channels, each of which an op treats by itself: the mesh's model axis splits them.

    Attributes:
      arrays: by the name of an array, its axis of them; others have none.
      outputs: the same of what the op returns, one array or several.
    """

    arrays: Mapping[str, int] = {}
    outputs: Any = None


WHOLE = Channels()
"""Every device along the model axis has all of them."""


def splits_channels() -> bool:
    """Whether the current mesh has a model axis."""
    return model_axis() > 1


def model_axis() -> int:
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape["model"]


def heads(what: str, count: int, arrays: Mapping[str, int], outputs: Any) -> Channels:
    """The channels of an op over so many heads.

    Raises:
      ValueError: the current mesh has a model axis that does not divide them.
    """
    return Channels(arrays, outputs) if model_parts(what, count) > 1 else WHOLE


def elements(count: int, arrays: Mapping[str, int], outputs: Any) -> Channels:
    """The channels of an op over so many elements; ``WHOLE`` where they do not divide."""
    parts = model_axis()
    return WHOLE if parts == 1 or count % parts else Channels(arrays, outputs)


def shared_heads(*arrays: Array) -> tuple[Array, ...]:
    """Keys ``(B, L, G, K)`` that heads share, so often that the model axis divides them.

    Each part of the heads finds its keys in its own part of the groups; head h reads group
    ``h // (heads / G)``, before and after.
    """
    parts = model_axis()
    groups = arrays[0].shape[2]
    times = math.lcm(groups, parts) // groups
    return arrays if times == 1 else tuple(jnp.repeat(x, times, axis=2) for x in arrays)


def over_rows(
    op: Callable[..., Any],
    shared: Arrays,
    rows: Arrays,
    *,
    channels: Channels = WHOLE,
    check_vma: bool = True,
) -> Any:
    """``op(**shared, **rows)``, rows split over the data axis of the current mesh, if any.

    Args:
      op: takes arrays by name and returns arrays whose axis 0 is the batch.
      shared: arguments that every device has in full; their gradients are summed over devices.
      rows: arguments ``(B, ...)``, or None.
      channels: what the mesh's model axis splits.
      check_vma: as in `jax.shard_map`; False for kernels that do not know of it, where nothing may
        be replicated.
    """
    if current_mesh() is None:
        return op(**shared, **rows)
    return _mapped(
        lambda shared, rows: op(**shared, **rows),
        (PartitionSpec(), ROWS),
        ROWS,
        (shared, rows),
        channels,
        check_vma=check_vma,
    )


def over_channels(op: Callable[..., Any], shared: Arrays, channels: Channels) -> Any:
    """``op(**shared)`` of parameters alone, whose channels the mesh's model axis splits."""
    if current_mesh() is None:
        return op(**shared)
    return _mapped(
        lambda shared: op(**shared),
        (PartitionSpec(),),
        PartitionSpec(),
        (shared,),
        channels,
    )


def over_tokens(
    op: Callable[..., Any],
    out_specs: Any,
    shared: Arrays,
    rows: Arrays,
    tokens: Arrays,
    *,
    channels: Channels = WHOLE,
    check_vma: bool = True,
) -> Any:
    """``op(shared, rows, tokens)`` of each device's part, all of them dicts.

    Args:
      op: returns arrays that are split as ``out_specs`` says, ``ROWS`` or ``TOKENS``.
      shared: arguments that every device has in full.
      rows: arguments ``(B, ...)`` that all shards of a row have.
      tokens: arguments ``(B, L, ...)``, whose length is split.
      channels, check_vma: as ``over_rows`` has them.
    """
    specs = (PartitionSpec(), ROWS, TOKENS)
    return _mapped(op, specs, out_specs, (shared, rows, tokens), channels, check_vma=check_vma)


def each_shard(function: Callable[..., Any], tokens: Arrays) -> Any:
    """``function(**tokens)`` of each shard's tokens; of whole rows where they are not split."""
    length = next(x for x in tokens.values() if x is not None).shape[1]
    if shards_of(length) == 1:
        return function(**tokens)
    return over_tokens(lambda shared, rows, tokens: function(**tokens), TOKENS, {}, {}, tokens)


def _mapped(
    op: Callable[..., Any],
    in_specs: tuple[PartitionSpec, ...],
    out_specs: Any,
    parts: tuple[Arrays, ...],
    channels: Channels,
    *,
    check_vma: bool = True,
) -> Any:
    """`jax.shard_map` of ``op(*parts)``, dicts of arrays or None, on the current mesh.

    All arrays are typed to vary over the axes that any is split over, so that the gradients of
    those that are not split are summed here, and as real numbers: XLA aborts on some sums of
    complex ones.
    """
    axes = tuple(axis for axis in in_specs[-1] if axis is not None)
    if channels.arrays:
        axes += ("model",)

    def local(*parts: Arrays) -> Any:
        if axes:
            index = jax.lax.axis_index(axes)
            parts = jax.tree.map(lambda x: compat.match_vma(x, index)[0], parts)
        return op(*({name: joined(x) for name, x in part.items()} for part in parts))

    real = ({name: planes(x) for name, x in part.items()} for part in parts)
    specs = tuple(
        {name: _split(spec, channels.arrays.get(name)) for name in part}
        for spec, part in zip(in_specs, parts, strict=True)
    )
    return jax.shard_map(
        local,
        mesh=current_mesh(),
        in_specs=specs,
        out_specs=_split_outputs(out_specs, channels.outputs),
        check_vma=check_vma,
    )(*real)


def _split(spec: Any, axis: int | None) -> Any:
    """``spec`` of an array whose ``axis`` the model axis splits too; as it is for no axis."""
    if axis is None:
        return spec
    return PartitionSpec(*spec, *(None,) * (axis - len(spec)), "model")


def _split_outputs(specs: Any, axes: Any) -> Any:
    """``specs``, one for all outputs or one for each, with ``Channels.outputs``."""
    if not isinstance(axes, tuple):
        return _split(specs, axes)
    one = isinstance(specs, PartitionSpec)
    return tuple(map(_split, (specs,) * len(axes) if one else specs, axes))


def planes(x: Any) -> Any:
    """``(re, im)`` of a complex array."""
    return (x.real, x.imag) if x is not None and jnp.iscomplexobj(x) else x


def joined(x: Any) -> Any:
    """The inverse of ``planes``."""
    return jax.lax.complex(*x) if isinstance(x, tuple) else x
