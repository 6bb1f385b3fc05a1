"""Programs of ours that turn what is no program that prints lines into one; each runs as a session of its own.

They stand alone: nothing of `orchestrator` is imported, and what they need beyond the standard library is an extra.
"""
