"""Data sets, their on-disk cache, and batches with checkpointable iterators."""
