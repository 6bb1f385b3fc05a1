"""The commands of a session as tools, by the Model Context Protocol (https://modelcontextprotocol.io).

A face like the command line: what it is asked goes through the session's mailbox, and it may no more than that session.
The official SDK is imported when it is needed, for it takes long and is an extra.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from orchestrator.client import main as client
from orchestrator.client.commands import (
    MCP_SERVER_NAME,
    OBJECT,
    PATHS,
    SECONDS,
    SESSION_COMMANDS,
    VALUE,
    VERSION,
    Argument,
    SessionCommand,
)
from orchestrator.client.quick_parser import ParsedCommand
from orchestrator.client.session import SessionConnection, SessionRequestError, find_session
from orchestrator.errors import RefusedError

if TYPE_CHECKING:
    from mcp_types import CallToolRequestParams, CallToolResult, ListToolsResult, PaginatedRequestParams

    from orchestrator.protocols import JsonObject

_INSTALL = "`pip install 'cli-council[mcp]'` into the environment of `council`"
_INSTRUCTIONS = (
    "Other agents work on the same repository at the same time, each in a worktree of its own. Lock the files that you "
    "are about to change, tell by report what you are at, share what they wait for, and leave notes that later "
    "sessions should know."
)


async def serve() -> None:
    """Serve on standard input and output until that ends.

    Raises RefusedError where this process is in no session, or where the SDK is not installed.
    """
    try:
        from mcp.server.lowlevel import Server
        from mcp.server.stdio import stdio_server
    except ImportError:
        raise RefusedError("the SDK of the Model Context Protocol is not installed", _INSTALL) from None
    try:
        session = find_session(os.environ, str(Path.cwd()))
    except SessionRequestError as error:
        raise RefusedError(error.what, error.remedy) from None

    async def call(_: Any, params: CallToolRequestParams) -> CallToolResult:
        return await anyio.to_thread.run_sync(partial(_call_tool, session, params.name, params.arguments or {}))

    server = Server(MCP_SERVER_NAME, instructions=_INSTRUCTIONS, on_list_tools=_list_tools, on_call_tool=call)
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())


async def _list_tools(_: Any, _params: PaginatedRequestParams | None) -> ListToolsResult:
    from mcp_types import ListToolsResult, Tool, ToolAnnotations

    # No tool changes a file or removes anything of a user; a CLI that only reads then allows them without asking.
    annotations = ToolAnnotations(
        read_only_hint=True, destructive_hint=False, idempotent_hint=False, open_world_hint=False
    )
    return ListToolsResult(
        tools=[
            Tool(
                name=one.name,
                description=f"{one.help} {one.more}",
                input_schema=input_schema(one),
                annotations=annotations,
            )
            for one in SESSION_COMMANDS.values()
        ]
    )


def _call_tool(session: SessionConnection, name: str, given: JsonObject) -> CallToolResult:
    from mcp_types import CallToolResult, TextContent

    def said(text: str, *, is_error: bool = False, result: JsonObject | None = None) -> CallToolResult:
        return CallToolResult(content=[TextContent(text=text)], structured_content=result, is_error=is_error)

    command = SESSION_COMMANDS.get(name)
    if command is None:
        return said(f"there is no tool {name[:40]!r}: there are {', '.join(SESSION_COMMANDS)}", is_error=True)
    try:
        result = dict(client.ask_session(session, ParsedCommand(command, given, as_json=True), session.tree))
    except SessionRequestError as error:
        return said(str(error), is_error=True)
    return said(json.dumps(result), result=result)


def input_schema(command: SessionCommand) -> JsonObject:
    """Return the JSON Schema of what a command takes; paths are from the worktree's top."""
    return {
        "type": "object",
        "properties": {one.name: _schema(one) for one in command.arguments},
        "required": [one.name for one in command.arguments if one.is_needed],
        "additionalProperties": False,
    }


def _schema(argument: Argument) -> JsonObject:
    schema: JsonObject = {"type": "string"}
    if argument.kind == PATHS:
        schema = {"type": "array", "items": {"type": "string"}}
    elif argument.kind == SECONDS:
        schema = {"type": "number", "minimum": 0}
    elif argument.kind == VERSION:
        schema = {"type": "integer", "minimum": 0}
    elif argument.kind == VALUE:
        schema = {}
    elif argument.kind == OBJECT:
        schema = {"type": "object"}
    elif argument.choices:
        schema["enum"] = list(argument.choices)
    return {**schema, "description": argument.help}
