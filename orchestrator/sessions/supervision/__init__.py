"""Start a program and make sure that nothing it started outlives it."""
