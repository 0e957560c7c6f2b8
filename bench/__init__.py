"""Benchmarks with pytest-benchmark: `pytest bench --benchmark-only`."""
