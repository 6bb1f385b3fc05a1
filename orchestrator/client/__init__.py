"""What a program in a session asks its orchestrator by: the standard library alone, and little of it.

An agent types these commands all day, and a hook runs one before each edit. So none of this imports what takes long:
no `typing`, `dataclasses`, `pathlib`, `argparse` or `socket`. `orchestrator.__main__` comes here before anything else.
"""
