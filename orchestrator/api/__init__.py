"""The Python API, for scripts and the command line; `Council` is its entry point.

`topics` has the operations of a council by subject, `execution` creates and executes runs. Inside the package imports
point from `council` to `topics`, `execution`, `run_reader`, `run_index` and `context`. May import every package below;
only `cli` and `mcp_server` may import it.
"""
