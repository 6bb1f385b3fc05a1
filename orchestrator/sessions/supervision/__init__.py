"""Start a program and ensure that no process it starts outlives it."""
