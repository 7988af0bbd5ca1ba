"""Putting a run on rented machines: the commands, and what to do when they fail. Runs on a laptop, without jax."""
