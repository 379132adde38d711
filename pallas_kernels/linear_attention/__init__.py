"""Linear attention: a matrix state that decays and takes up outer products."""

from pallas_kernels.linear_attention.api import entering, linear_attention

__all__ = ["entering", "linear_attention"]
