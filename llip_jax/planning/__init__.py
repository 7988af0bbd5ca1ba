"""What a run will cost before it starts: memory, work and communication of the compiled step, and its time."""
