"""Benchmarks: one program each; `python -m benchmarks` runs all of them."""
