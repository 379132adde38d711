"""Long convolution, one filter a channel, one- or two-sided: S4, SGConv, Hyena."""

from pallas_kernels.long_conv.api import long_conv

__all__ = ["long_conv"]
