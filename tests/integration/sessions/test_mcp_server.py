"""`council mcp` as a client of the Model Context Protocol sees it, in its own session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest

from orchestrator.client.commands import SESSION_COMMANDS
from orchestrator.mcp_server import input_schema
from orchestrator.repo.worktrees.hub import Hub
from tests.fake_session_service import FakeSessionService
from tests.integration.sessions.test_session_socket import Caller, Site

if TYPE_CHECKING:
    from mcp import ClientSession


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Yield an environment for sessions."""
    (tmp_path / "hub").mkdir()
    return Site(Hub(tmp_path / "hub"), FakeSessionService(foreign_owners={"theirs.txt": "run-0/other.1"}))


@asynccontextmanager
async def client(site: Site) -> AsyncIterator[ClientSession]:
    """Connect to the server of a session, started as a CLI does: without the session's variables.

    This process holds the session lock, like the supervisor that the server descends from.
    """
    from mcp import ClientSession, StdioServerParameters, stdio_client  # noqa: PLC0415  the import takes a second

    async with site.session() as (worktree, session_socket):
        caller = Caller(worktree)
        server = session_socket.server
        assert server is not None
        started = StdioServerParameters(command=server.argv[0], args=[*server.argv[1:]], cwd="/")
        async with stdio_client(started) as streams, ClientSession(*streams) as session:
            await session.initialize()
            yield session
        del caller


async def test_tools_match_the_commands(site: Site) -> None:
    async with client(site) as session:
        tools = (await session.list_tools()).tools
    assert [tool.name for tool in tools] == list(SESSION_COMMANDS)
    assert all(tool.description for tool in tools)
    assert tools[0].input_schema["required"] == ["paths"]


@pytest.mark.extended
async def test_tools_declare_that_they_change_no_file(site: Site) -> None:
    """A read-only CLI then allows them, including `submit_handoff`."""
    async with client(site) as session:
        tools = (await session.list_tools()).tools
    found = {tool.name: tool.annotations for tool in tools}
    assert {name for name, one in found.items() if one is not None and one.read_only_hint} == set(SESSION_COMMANDS)
    assert [name for name, one in found.items() if one is None or one.destructive_hint is not False] == []


async def test_tool_asks_as_the_session(site: Site) -> None:
    """And returns the answer; a rejection is an error that names the owner of the file."""
    async with client(site) as session:
        peers = await session.call_tool("peers", {})
        assert peers.structured_content is not None
        assert [one["task"] for one in peers.structured_content["peers"]] == ["models"]
        assert (await session.call_tool("lock", {"paths": ["src/a.py"]})).structured_content == {"locked": ["src/a.py"]}
        refused = await session.call_tool("lock", {"paths": ["theirs.txt"]})
        assert (refused.is_error, "run-0/other.1" in str(refused.content)) == (True, True)
        for odd in ({"paths": "a"}, {"paths": [1]}, {"paths": ["../a"]}, {"paths": ["a"], "wait": "long"}, {}):
            assert (await session.call_tool("lock", odd)).is_error, odd
        assert (await session.call_tool("shutdown", {})).is_error
        assert not (await session.call_tool("peers", {})).is_error
    assert {str(session) for session, _, _ in site.session_service.asked} == {"run-1/models.1"}


@pytest.mark.extended
async def test_values_are_passed_unchanged(site: Site) -> None:
    async with client(site) as session:
        value = {"ports": [8080, None], "name": "größer"}
        assert not (await session.call_tool("share_put", {"key": "k", "value": value})).is_error
        got = (await session.call_tool("share_wait", {"key": "k", "after": 0, "timeout": 1})).structured_content
        assert got is not None
        assert got["value"] == value
        assert not (await session.call_tool("submit_handoff", {"data": {"summary": "done"}})).is_error
        for odd in ({}, {"data": [1]}, {"data": "none"}):
            assert (await session.call_tool("submit_handoff", odd)).is_error, odd
    assert site.session_service.handed_over == [{"summary": "done"}]


@pytest.mark.parametrize("name", SESSION_COMMANDS)
def test_each_schema_is_valid(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(input_schema(SESSION_COMMANDS[name]))
