"""`council mcp`."""

from __future__ import annotations

import click

from orchestrator.cli.command import Context, perform


@click.command()
def mcp() -> None:
    """Serve the commands of a session by the Model Context Protocol.

    On standard input and output, with the rights of the session in whose worktree it is started. CLIs that can use such
    servers get it from `council run`; by hand it is of use only to look at it.

    \b
    Examples:
      council mcp
    """

    async def command(_: Context) -> int:
        from orchestrator import mcp_server  # noqa: PLC0415  as late as its SDK

        await mcp_server.serve()
        return 0

    perform(command, as_json=False)
