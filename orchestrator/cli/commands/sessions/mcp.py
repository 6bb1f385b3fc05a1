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
def mcp() -> None:
    """Serve the session commands as Model Context Protocol tools.

    Uses standard input and output, and has the permissions of the session in whose worktree it starts. `council run`
    configures it for CLIs that support such servers.

    \b
    Examples:
      council mcp
    """
    with error_boundary(Output(as_json=False), ErrorLog()):
        try:
            from orchestrator import mcp_server  # noqa: PLC0415  its SDK is an optional dependency
        except ImportError:
            raise RefusedError("the MCP SDK is not installed", _INSTALL) from None
        anyio.run(mcp_server.serve)
