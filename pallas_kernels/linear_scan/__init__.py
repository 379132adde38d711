"""Diagonal linear recurrence: `h_t = a_t * h_{t-1} + b_t`, real or complex."""

from pallas_kernels.linear_scan.api import linear_scan, summary

__all__ = ["linear_scan", "summary"]
