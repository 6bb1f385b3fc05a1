"""Contract suites for plugins, a fake CLI, a manual clock and the invariants of a run."""
