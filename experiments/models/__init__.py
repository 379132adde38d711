"""Benchmarks of whole models against other libraries."""
