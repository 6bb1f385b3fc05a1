"""Programs that wrap other interfaces as CLIs that print lines.

Each runs as a separate process. They are independent: they import nothing from `orchestrator`, and dependencies beyond
the standard library are extras.
"""
