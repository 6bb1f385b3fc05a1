"""The `council` command: `main` is the entry point.

`commands` has one module for each group of commands, `core` what all commands share, `render` turns results into text,
and `live` shows an active run. Nothing imports this package.
"""
