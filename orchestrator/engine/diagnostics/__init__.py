"""Checks before a run: programs, sandbox, repository, machine. `doctor` and `preflight` are the entry points."""
