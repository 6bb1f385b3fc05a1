"""The sink, the tracker and the handoff kinds that ship with the package.

They are registered through the entry-point group `cli_council`, as third-party plugins are. Nothing imports them.
"""
