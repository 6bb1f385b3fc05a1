"""Contract suites for plugins, recordings of programs, and a manual clock."""
