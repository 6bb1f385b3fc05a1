"""The adapter of programs that are configured in YAML: by the run's file, or by a profile."""
