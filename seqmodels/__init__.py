"""Efficient long-sequence models in JAX: mixers, models, data, training."""

__version__ = "0.1.0"
"""The one place that says it; the package's metadata are made from it."""
