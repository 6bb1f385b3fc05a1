"""Commands that start, inspect and control runs and their tasks."""
