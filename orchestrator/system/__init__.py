"""Processes, file locks, limits and clock. Only `process` starts processes."""
