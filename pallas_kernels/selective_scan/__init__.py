"""Mamba's selective scan: discretise, scan and contract in one pass."""

from pallas_kernels.selective_scan.api import selective_scan, summary

__all__ = ["selective_scan", "summary"]
