"""Check programs, sandbox, repository and machine: `doctor` and `preflight`."""
