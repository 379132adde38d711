"""Training: config, optimizer groups, state, step, loop, checkpoints, metrics."""
