"""Results of runs and tasks, as the shell prints them and Python returns them. Pure."""
