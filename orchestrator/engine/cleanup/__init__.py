"""Find leftovers of runs, and remove the records of ended runs."""
