"""What is static about a call."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """`scale` on the scores; `tiles` (tokens, checkpoints) met at once, None for what suits."""

    scale: float
    interval: int
    tiles: tuple[int, int] | None = None
