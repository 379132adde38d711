"""What is static about a call."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """`scale` on the outputs; `chunk` tokens meet pairwise, None for what suits the backend."""

    scale: float
    chunk: int | None = None
