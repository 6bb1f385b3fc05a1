"""Results of runs and tasks, as printed by commands and returned by the Python API. Pure."""
