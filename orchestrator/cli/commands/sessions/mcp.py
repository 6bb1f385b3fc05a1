"""The command that serves the session commands as MCP tools.

Does not use `cli.core.command`, which is slow to import: CLIs do not wait long for a server.
"""

from __future__ import annotations

import anyio
import click

from orchestrator.cli.core.error_boundary import ErrorLog, error_boundary
from orchestrator.cli.render.output import Output
from orchestrator.errors import RefusedError

_INSTALL = "run `pip install 'cli-council[mcp]'` in the environment of `council`"


@click.command()
@click.option("--steer", is_flag=True, help="Serve tools that steer runs, with your permissions.")
def mcp(steer: bool) -> None:
    """Serve the session commands as Model Context Protocol tools.

    Uses standard input and output, and has the permissions of the session in whose worktree it starts. `council run`
    configures it for CLIs that support such servers. With --steer, an agent outside of sessions plans, starts, watches,
    approves and lands the runs of the current folder's project.

    \b
    Examples:
      council mcp
      council mcp --steer
    """
    with error_boundary(Output(as_json=False), ErrorLog()):
        try:
            if steer:
                from orchestrator.cli.steering.server import serve_steering as serve  # noqa: PLC0415  as below
            else:
                from orchestrator.mcp_server import serve  # noqa: PLC0415  its SDK is an optional dependency
        except ImportError:
            raise RefusedError("the MCP SDK is not installed", _INSTALL) from None
        anyio.run(serve)
