"""The `council` command: `main` is the entry point.

`commands` has one module for each group of commands, `core` has their shared parts, `render` turns results into text,
`live` shows an active run, and `steering` serves tools to another agent. No other package imports this one.
"""
