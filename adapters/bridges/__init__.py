"""Programs that make other interfaces available as CLIs that print lines; each runs as a separate process.

They stand alone: nothing of `orchestrator` is imported, and what they need beyond the standard library is an extra.
"""
