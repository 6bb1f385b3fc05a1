"""Client of the session API: the commands that programs in a session use to reach their orchestrator.

Agents run these commands often, and a hook runs one before each edit. To start fast, this package uses little of the
standard library: no `typing`, `dataclasses`, `pathlib`, `argparse` or `socket`. `orchestrator.__main__` tries it first.
"""
