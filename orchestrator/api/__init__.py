"""The Python API: `Council` in `council` is the entry point, for scripts and for the command line.

The other modules are what `Council` hands out: runs, history, logs and leftovers of tasks, cleanup. May import every
package below; only `cli` and `mcp_server` may import it.
"""
