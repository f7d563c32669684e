"""A run: what it needs before it starts, its steps, its checkpoints and results."""
