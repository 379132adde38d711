"""The convolution kernel of S4: a diagonal plus low-rank state-space model through its spectrum."""

from pallas_kernels.s4_kernel.api import s4_kernel

__all__ = ["s4_kernel"]
