"""Efficient sequence operators: arrays in, arrays out, on TPU, GPU and CPU."""

from pallas_kernels import segments
from pallas_kernels.dispatch import explain
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.validate import checked

__all__ = ["checked", "explain", "linear_scan", "segments", "selective_scan"]
