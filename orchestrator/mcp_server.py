"""The MCP server of the session commands (https://modelcontextprotocol.io).

Requests go through the session socket, so the server has the same permissions as the session. Import this module only
to serve: the official SDK is slow to import and an optional dependency.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp_types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    Tool,
    ToolAnnotations,
)

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
from orchestrator.protocols import JsonObject

_INSTRUCTIONS = (
    "Other agents work on the same repository at the same time, each in its own worktree. Lock files before you change "
    "them, report your status, share the values that other sessions wait for, and leave notes for later sessions."
)


async def serve() -> None:
    """Serve on standard input and output until the client closes them.

    Raises RefusedError if this process is not part of a session.
    """
    try:
        session = find_session(os.environ, str(Path.cwd()))
    except SessionRequestError as error:
        raise RefusedError(error.message, error.remedy) from None

    async def call(_: Any, params: CallToolRequestParams) -> CallToolResult:
        return await anyio.to_thread.run_sync(partial(_call_tool, session, params.name, params.arguments or {}))

    server = Server(MCP_SERVER_NAME, instructions=_INSTRUCTIONS, on_list_tools=_list_tools, on_call_tool=call)
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())


async def _list_tools(_: Any, _params: PaginatedRequestParams | None) -> ListToolsResult:
    # No tool changes files or user data. With this hint, CLIs in read-only mode allow the tools without asking.
    annotations = ToolAnnotations(
        read_only_hint=True, destructive_hint=False, idempotent_hint=False, open_world_hint=False
    )
    return ListToolsResult(
        tools=[
            Tool(
                name=command.name,
                description=f"{command.help} {command.more}",
                input_schema=input_schema(command),
                annotations=annotations,
            )
            for command in SESSION_COMMANDS.values()
        ]
    )


def _call_tool(session: SessionConnection, name: str, arguments: JsonObject) -> CallToolResult:
    def result_of(text: str, *, is_error: bool = False, result: JsonObject | None = None) -> CallToolResult:
        return CallToolResult(content=[TextContent(text=text)], structured_content=result, is_error=is_error)

    command = SESSION_COMMANDS.get(name)
    if command is None:
        known = ", ".join(SESSION_COMMANDS)
        return result_of(f"unknown tool {name[:40]!r} (tools: {known})", is_error=True)
    try:
        result = dict(client.ask_session(session, ParsedCommand(command, arguments, as_json=True), session.tree))
    except SessionRequestError as error:
        return result_of(str(error), is_error=True)
    return result_of(json.dumps(result), result=result)


def input_schema(command: SessionCommand) -> JsonObject:
    """Return the JSON Schema of a command's arguments.

    Paths are relative to the worktree.
    """
    return {
        "type": "object",
        "properties": {argument.name: _schema(argument) for argument in command.arguments},
        "required": [argument.name for argument in command.arguments if argument.is_word],
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
