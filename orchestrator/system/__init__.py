"""The machine: processes, file locks, limits, clock, failpoints. `process` is the only way to start a process."""
