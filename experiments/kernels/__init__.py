"""Benchmarks of the kernels against what users would write without them."""
