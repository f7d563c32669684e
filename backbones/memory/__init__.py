"""The memory of a training step, counted before it runs; budgets; numerical drift."""
