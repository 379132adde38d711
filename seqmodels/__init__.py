"""Sequence models in JAX: mixers, models, sequence parallelism, data and training."""
