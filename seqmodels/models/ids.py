"""Ids of tokens against the size of a table, where they are known."""

from typing import Any

import jax
import numpy as np


def check_ids(name: str, ids: Any, size: int) -> None:
    """Refuses integer ids outside of ``[0, size)`` that are known now.

    Known are numpy arrays, and JAX arrays on CPUs outside of ``jit``: looking at those of another
    device would wait for it. Elsewhere such an id becomes NaN (see ``Embedding``).

    Raises:
      ValueError: an id is out of range; the message has it, and ``name``.
    """
    if isinstance(ids, jax.core.Tracer) or not ids.size:
        return
    if isinstance(ids, jax.Array) and not (
        ids.is_fully_addressable and all(device.platform == "cpu" for device in ids.devices())
    ):
        return
    known = np.asarray(ids)
    for extreme in (known.min(), known.max()):
        if not 0 <= extreme < size:
            raise ValueError(
                f"{name} hold the id {extreme}, outside of vocabulary_size={size}: ids are in "
                f"[0, {size})"
            )
