"""Benchmarks: each is a program; `python -m benchmarks` runs all."""
