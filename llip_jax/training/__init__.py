"""State, step, optimizer, loop, checkpoints, metrics."""
