"""Orders of mixers in published hybrid models, for `BackboneConfig.layout`."""

import itertools

PATTERNS: dict[str, tuple[str, ...]] = {
    # De et al. 2024, arXiv:2402.19427: two recurrent blocks, then local attention.
    "griffin": ("rg_lru", "rg_lru", "sliding_window"),
    # Ren et al. 2024, arXiv:2406.07522: in turn, each with an MLP.
    "samba": ("mamba", "sliding_window"),
    # Lieber et al. 2024, arXiv:2403.19887: attention in one of eight blocks, without positions.
    "jamba": (*("mamba",) * 4, "attention", *("mamba",) * 3),
    # Wei et al. 2025: RAT in turn with attention to a window.
    "rat_sliding_window": ("rat", "sliding_window"),
    # Jafari et al. 2025: the local mixer is within the block, see `SCOUTConfig.local`.
    "scout": ("scout",),
}


def layout(pattern: str, layers: int) -> tuple[str, ...]:
    """So many blocks of a pattern, cut where they end.

    Args:
      pattern: a key of `PATTERNS`, or the name of a mixer for a stack of it alone.
      layers: number of blocks.

    Raises:
      ValueError: fewer than one layer.
    """
    if layers < 1:
        raise ValueError(f"layout: layers={layers} must be positive")
    return tuple(itertools.islice(itertools.cycle(PATTERNS.get(pattern, (pattern,))), layers))
