"""Softmax attention of a row whose length is split, by the name of the strategy."""

from typing import Any

from jaxtyping import Array

from seqmodels.parallel.gather import gather
from seqmodels.parallel.ring import ring
from seqmodels.parallel.ulysses import ulysses
from seqmodels.parallel.window import windowed


def run(
    strategy: str,
    q: Array,
    k: Array,
    v: Array,
    segments: Any,
    positions: Any,
    *,
    causal: bool,
    window: int | None,
    sinks: int,
    scale: float | None,
) -> Array:
    """The outputs of one shard; arguments and result as in ``gather``, which serves everything."""
    shared: dict[str, Any] = {"scale": scale, "segments": segments}
    if strategy == "ring":
        # Only a length of two halves can be balanced.
        return ring(q, k, v, causal=causal, balance=q.shape[1] % 2 == 0, **shared)
    shared |= {"sinks": sinks, "positions": positions if sinks else None}
    if strategy == "halo":
        assert window is not None  # it is a strategy of `sliding_window`
        return windowed(q, k, v, window=window, **shared)
    everything = {"gather": gather, "ulysses": ulysses}[strategy]
    return everything(q, k, v, causal=causal, window=window, **shared)
