"""Results of runs and tasks, as the commands and the Python API return them. Pure."""
