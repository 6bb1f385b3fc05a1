"""The machine: processes, file locks, limits, clock, failpoints. Only `process` starts processes."""
