"""Benchmarks: each a program of its own, all of them together `python -m benchmarks`."""
