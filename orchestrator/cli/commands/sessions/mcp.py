"""`council mcp`.

It does not use `cli.core.command`, whose imports take a second: CLIs do not wait long for a server.
"""

from __future__ import annotations

import anyio
import click

from orchestrator.cli.core.error_boundary import ErrorLog, error_boundary
from orchestrator.cli.render.output import Output


@click.command()
def mcp() -> None:
    """Serve the commands of a session by the Model Context Protocol.

    On standard input and output, with the rights of the session in whose worktree it is started. CLIs that can use such
    servers get it from `council run`; by hand it is of use only to look at it.

    \b
    Examples:
      council mcp
    """
    from orchestrator import mcp_server  # noqa: PLC0415  as late as its SDK

    with error_boundary(Output(as_json=False), ErrorLog()):
        anyio.run(mcp_server.serve)
