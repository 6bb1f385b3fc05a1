"""An MCP server with which another agent steers the runs of this user.

`server.serve_steering` is the entry point, `tools` has one class per tool. A call opens the council and is recorded
before it is performed. May import `api`, and `cli.render`.
"""
