"""Dropout whose mask is shared by all time steps of a row."""

import flax.linen as nn


def tied_dropout(rate: float, deterministic: bool) -> nn.Dropout:
    """Dropout for ``(B, L, H)`` that drops whole channels of a sequence (the LRA recipes')."""
    return nn.Dropout(rate, broadcast_dims=(1,), deterministic=deterministic)
