"""The client of the session API, for programs in a session.

Agents run its commands often, and a hook runs one before each edit. To start fast, this package uses little of the
standard library: no `typing`, `dataclasses`, `pathlib`, `argparse` or `socket`. `orchestrator.__main__` tries this
package first.
"""
