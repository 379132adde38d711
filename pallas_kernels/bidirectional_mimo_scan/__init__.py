"""A diagonal recurrence between two projections, both ways: bidirectional S5 and LRU."""

from pallas_kernels.bidirectional_mimo_scan.api import bidirectional_mimo_scan

__all__ = ["bidirectional_mimo_scan"]
