"""Benchmarks of the toolkit. Each is a module: ``python -m benchmarks.bench_speed --help``."""
