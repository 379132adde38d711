"""Linear attention: a matrix state that decays and takes up outer products."""

from pallas_kernels.linear_attention.api import linear_attention

__all__ = ["linear_attention"]
