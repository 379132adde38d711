"""Causal depthwise convolution of a few taps, with a carried window and a fused activation."""

from pallas_kernels.causal_conv1d.api import causal_conv1d

__all__ = ["causal_conv1d"]
