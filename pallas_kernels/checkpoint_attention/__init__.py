"""Checkpoint attention: each token sees itself and every n-th token of its past."""

from pallas_kernels.checkpoint_attention.api import checkpoint_attention
from pallas_kernels.checkpoint_attention.cache import Cache
from pallas_kernels.checkpoint_attention.tile import merge

__all__ = ["Cache", "checkpoint_attention", "merge"]
