"""Efficient long-sequence models in JAX: mixers, models, data, training."""
