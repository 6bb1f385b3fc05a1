"""The socket by which a session asks its orchestrator, while it is at work.

    <the session's folder>/mailbox/
      socket          takes one request a connection: a line of JSON there, a line back
      session.json    the worktree, and the token without which nothing is answered
      bin/council     the command, knowing the session that it is of

The folder is the session's own: in a sandbox no other session sees it. Where a sandbox can't hide the socket itself
(Landlock), a process of another session is refused, whatever token it has (`sessions.socket.peers`). What comes in over the
socket harms nobody but its sender: connections of one session take no slot of another, and of those that have not sent
a whole line the oldest gives way to a new one.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Protocol

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from orchestrator.client.commands import MAX_REQUEST_BYTES, MCP_SERVER_NAME
from orchestrator.client.session import SESSION_FILE, SESSION_VARIABLE, SOCKET_NAME, ShortSocketPath
from orchestrator.config.model import PathAccess
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.errors import CouncilError, RefusedError
from orchestrator.protocols import JsonObject, McpServer
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.socket.connections import accept_connection, run_in_background
from orchestrator.sessions.socket.peers import belongs_to_session
from orchestrator.sessions.socket.requests import OWN_COMMAND_REMEDY, read_request
from orchestrator.system.process import internal_program, internal_program_folders, without_dotdot

_PROGRAM = Path("bin", "council")
_MAX_CONNECTIONS = 32  # connections of the session that are served
_MAX_FOREIGN_CONNECTIONS = 4  # of processes of no session or another, which get nothing but a refusal
_WAITING = 128
_REQUEST_TIMEOUT = 5.0  # seconds for a request to come in, and for its answer to be taken
_FOREIGN_TIMEOUT = 1.0
_MAX_FAULTS = 10
_READ_AT_ONCE = 1 << 14  # bytes of a request whose reading holds nobody up
_FAULT = "the orchestrator could not answer, by a fault of its own"
_FAULT_REMEDY = "go on without it: what you change is checked when it lands"


class SessionApi(Protocol):
    """Who answers what sessions ask."""

    async def answer(self, session: SessionName, command: str, arguments: JsonObject) -> JsonObject:
        """Return the result of a command of `orchestrator.client.commands`; RefusedError is told to who asked.

        Cancelled where who asked does not wait any more.
        """


@dataclass(frozen=True, slots=True)
class SessionSocket:
    """What a session is to have so that it can ask.

    `reach` is for its fence; `command` is what starts `council` as this session. `faults` are those of the desk, as
    they come.
    """

    folder: Path
    reach: PathAccess
    faults: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The program `council`, knowing the session."""
        return str(self.folder / _PROGRAM)

    def extend_environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """Return an environment in which a program finds the mailbox, and `council` before any other."""
        path = [str((self.folder / _PROGRAM).parent), *([env["PATH"]] if env.get("PATH") else [])]
        return {**env, SESSION_VARIABLE: str(self.folder), "PATH": os.pathsep.join(path)}

    @property
    def server(self) -> McpServer | None:
        """Our own server of the Model Context Protocol; None where its SDK is not installed."""
        if find_spec("mcp") is None:
            return None
        return McpServer(MCP_SERVER_NAME, (self.command, "mcp"))

    @property
    def hook(self) -> tuple[str, ...]:
        """The command to run before an edit."""
        return (self.command, "hook", "pre-edit")


@asynccontextmanager
async def open_session_socket(worktree: Worktree, desk: SessionApi) -> AsyncIterator[SessionSocket]:
    """Have the desk answer what the session of a worktree asks, within the block. Raises OSError."""
    folder, token = worktree.socket_folder, token_hex(16)
    await anyio.to_thread.run_sync(_lay_out, folder, token, worktree.tree)
    mailbox = SessionSocket(folder, PathAccess(readable=(without_dotdot(folder), *internal_program_folders())))
    name = SessionName(worktree.run, worktree.task, worktree.attempt)
    clerk = _RequestHandler(name, token, worktree.tree, worktree.lock, desk, mailbox.faults)
    try:
        async with await _listen(folder) as listener, run_in_background(partial(_serve, listener, clerk)):
            yield mailbox
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(remove_session_socket, worktree)


def remove_session_socket(worktree: Worktree) -> None:
    """Take away what a session that is over could ask by; its folder may be kept. Blocks."""
    shutil.rmtree(worktree.socket_folder, ignore_errors=True)


def _lay_out(folder: Path, token: str, tree: Path) -> None:
    command = folder / _PROGRAM
    command.parent.mkdir(mode=0o700, parents=True)
    card = os.open(folder / SESSION_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(card, "w", encoding="utf-8") as file:
        json.dump({"token": token, "tree": str(tree)}, file)
    argv, env = internal_program("orchestrator.__main__", "main")
    env = {**env, SESSION_VARIABLE: str(folder)}
    settings = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())
    command.write_text(f'#!/bin/sh\n{settings}exec {shlex.join(argv)} "$@"\n', encoding="utf-8")
    command.chmod(0o700)


async def _listen(folder: Path) -> anyio.abc.SocketListener:
    with ShortSocketPath(str(folder)) as short:
        return await anyio.create_unix_listener(f"{short}/{SOCKET_NAME}", mode=0o600, backlog=_WAITING)


@dataclass(frozen=True, slots=True)
class _RequestHandler:
    """Takes the requests of one session to the desk."""

    session: SessionName
    token: str
    tree: Path
    lock: Path
    session_service: SessionApi
    faults: list[str]
    reading: dict[anyio.abc.SocketStream, anyio.CancelScope] = field(default_factory=dict)
    """The connections of the session that have not sent a whole line, the oldest first."""
    answering: set[anyio.abc.SocketStream] = field(default_factory=set)
    strangers: set[anyio.abc.SocketStream] = field(default_factory=set)

    async def answer(self, line: bytes) -> JsonObject:
        """Return the line back; raises nothing but cancellation."""
        try:
            read = partial(read_request, line, self.token, self.tree)
            request = read() if len(line) <= _READ_AT_ONCE else await anyio.to_thread.run_sync(read)
            return {
                "ok": True,
                "result": await self.session_service.answer(self.session, request.command, request.arguments),
            }
        except RefusedError as refused:
            return _refusal(refused.what, refused.remedy)
        except CouncilError as error:
            return _refusal(str(error), _FAULT_REMEDY)
        except Exception as error:
            if len(self.faults) < _MAX_FAULTS:
                self.faults.append(f"{type(error).__name__}: {error}")
            return _refusal(_FAULT, _FAULT_REMEDY)


def _refusal(what: str, remedy: str) -> JsonObject:
    return {"ok": False, "error": what, "remedy": remedy}


async def _serve(listener: anyio.abc.SocketListener, clerk: _RequestHandler) -> None:
    async with anyio.create_task_group() as group:
        while True:
            stream = await accept_connection(listener)
            connected = stream.extra(anyio.abc.SocketAttribute.raw_socket)
            is_ours = await anyio.to_thread.run_sync(belongs_to_session, connected, clerk.lock)
            if not is_ours and len(clerk.strangers) == _MAX_FOREIGN_CONNECTIONS:
                await stream.aclose()
            else:
                group.start_soon(_serve_connection, stream, clerk, is_ours)
            await anyio.lowlevel.checkpoint()


async def _serve_connection(stream: anyio.abc.SocketStream, clerk: _RequestHandler, is_ours: bool) -> None:
    """Serve one connection: whoever is slow, or breaks off, is left."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError):
        async with stream:
            await (_handle_request(stream, clerk) if is_ours else _refuse_connection(stream, clerk))


async def _refuse_connection(stream: anyio.abc.SocketStream, clerk: _RequestHandler) -> None:
    """Refuse a process that does not belong to the session."""
    clerk.strangers.add(stream)
    try:
        with anyio.move_on_after(_FOREIGN_TIMEOUT):
            await _line(stream)
            what = "the request is not of this session: its process was not started by the session"
            await stream.send(_encoded(_refusal(what, OWN_COMMAND_REMEDY)))
    finally:
        clerk.strangers.discard(stream)


async def _handle_request(stream: anyio.abc.SocketStream, clerk: _RequestHandler) -> None:
    line = await _request(stream, clerk)
    if line is None:
        return
    answer: JsonObject | None = None
    if len(clerk.answering) >= _MAX_CONNECTIONS:
        answer = _refusal(
            f"{_MAX_CONNECTIONS} requests of this session are being answered", "ask again when one has ended"
        )
    else:
        clerk.answering.add(stream)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_cancel_on_disconnect, stream, group.cancel_scope)
                answer = await _answer(line, clerk)
                group.cancel_scope.cancel()
        finally:
            clerk.answering.discard(stream)
    if answer is not None:
        with anyio.move_on_after(_REQUEST_TIMEOUT):
            await stream.send(_encoded(answer))


async def _request(stream: anyio.abc.SocketStream, clerk: _RequestHandler) -> bytes | None:
    """Return a connection's line; None where it does not come in time, or newer connections take its slot."""
    if len(clerk.reading) >= _MAX_CONNECTIONS:
        oldest = next(iter(clerk.reading))
        clerk.reading.pop(oldest).cancel()
    with anyio.move_on_after(_REQUEST_TIMEOUT) as scope:
        clerk.reading[stream] = scope
        try:
            return await _line(stream)
        finally:
            clerk.reading.pop(stream, None)
    return None


async def _answer(line: bytes, clerk: _RequestHandler) -> JsonObject:
    if len(line) > MAX_REQUEST_BYTES:
        return _refusal(f"the request is larger than {MAX_REQUEST_BYTES} bytes", "ask for less at once")
    return await clerk.answer(line)


def _encoded(answer: JsonObject) -> bytes:
    try:
        return json.dumps(answer, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError):
        return json.dumps(_refusal(_FAULT, _FAULT_REMEDY)).encode() + b"\n"


async def _line(stream: anyio.abc.SocketStream) -> bytes:
    """Return what comes before the first line break, or more than is allowed; raises EndOfStream."""
    got = bytearray()
    while len(got) <= MAX_REQUEST_BYTES:
        got += await stream.receive()
        if b"\n" in got:
            return bytes(got.partition(b"\n")[0])
    return bytes(got)


async def _cancel_on_disconnect(stream: anyio.abc.SocketStream, waiting: anyio.CancelScope) -> None:
    """Give the answer up once nobody waits for it; who says more than one line does not wait either."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError):
        await stream.receive()
    waiting.cancel()
