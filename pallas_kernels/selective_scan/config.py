"""What is static about one selective scan."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """`dt_softplus`: dt goes through a softplus; `reverse`: from the last token to the first."""

    dt_softplus: bool
    reverse: bool
