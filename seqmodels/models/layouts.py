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
    # Arora et al. 2024, arXiv:2402.18668 and arXiv:2407.05483: of "gated_conv" see `BASE_CONV`.
    "based": ("gated_conv", "based", "sliding_window", "gated_conv", "gated_conv"),
    "jrt": ("gated_conv", "jrt", "sliding_window", "gated_conv", "gated_conv"),
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


def sambay(layers: int) -> tuple[str, ...]:
    """SambaY: Samba's blocks, another Mamba, the only full attention, and layers that read both.

    Ren et al. 2025, arXiv:2507.06607. In the first half "mamba" and "sliding_window" in turn; block
    ``layers / 2`` is "mamba", the next "attention"; then "gmu" and "cross_attention" in turn, which
    read the memory of the one and the keys of the other.

    Raises:
      ValueError: ``layers`` is not a multiple of 4.
    """
    if layers < 4 or layers % 4:
        raise ValueError(f"sambay: layers={layers} must be a positive multiple of 4")
    first = ("mamba", "sliding_window") * (layers // 4)
    return (*first, "mamba", "attention", *("gmu", "cross_attention") * (layers // 4 - 1))


def masformer(layers: int, full: int) -> tuple[str, ...]:
    """MASFormer: "attention" in the first blocks, which read far, "sliding_window" in the others.

    Zhang et al., "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily
    at Every Layer", 2023 (arXiv:2310.12442).

    Args:
      layers: number of blocks.
      full: those with full attention.

    Raises:
      ValueError: ``full`` is negative or above ``layers``, or there is no layer.
    """
    if layers < 1 or not 0 <= full <= layers:
        raise ValueError(
            f"masformer: full={full} must be at least 0 and at most layers={layers}, a positive "
            "number"
        )
    return ("attention",) * full + ("sliding_window",) * (layers - full)
