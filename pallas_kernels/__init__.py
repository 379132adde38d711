"""Efficient sequence operators: arrays in, arrays out, on TPU, GPU and CPU."""

from pallas_kernels import segments
from pallas_kernels.linear_scan import linear_scan

__all__ = ["linear_scan", "segments"]
