"""Serve the session socket, over which a session sends requests.

    <session folder>/socket/
      socket          one request per connection: a line of JSON in, a line back
      session.json    the worktree and the token that every request needs
      bin/council     the `council` command, bound to the session
      post-tool       the hook after a tool call, which runs only if there may be messages of the user
      messages        exists if there may be such messages

In a sandbox, other sessions can't see this folder. Landlock can't hide the socket itself, so processes of other
sessions are rejected regardless of their token (`sessions.socket.peers`). A session can only harm itself: each has its
own connection limit, and a new connection replaces the oldest one that has not sent a whole line.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Literal, Protocol

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from orchestrator.client.commands import HOLD_SLOT, MAX_REQUEST_BYTES, MCP_SERVER_NAME
from orchestrator.client.session import SESSION_FILE, SESSION_VARIABLE, SOCKET_NAME, ShortSocketPath
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.settings.run_settings import PathAccess
from orchestrator.errors import CouncilError, RefusedError
from orchestrator.protocols import JsonObject, McpServer
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.socket.connections import accept_connection
from orchestrator.sessions.socket.peers import belongs_to_session
from orchestrator.sessions.socket.requests import OWN_COMMAND_REMEDY, read_request
from orchestrator.system.background import run_in_background
from orchestrator.system.process import internal_program, internal_program_folders, without_dotdot

_PROGRAM = Path("bin", "council")
_POST_TOOL = "post-tool"
_MAX_CONNECTIONS = 32  # per session
_MAX_FOREIGN_CONNECTIONS = 4  # connections from outside the session, which are only rejected
_BACKLOG = 128
_REQUEST_TIMEOUT = 5.0  # seconds to receive a request, and to send its response
_FOREIGN_TIMEOUT = 1.0
_MAX_FAULTS = 10
_MAX_INLINE_BYTES = 1 << 14  # larger requests are parsed in a thread
_FAULT = "internal error of the orchestrator"
_FAULT_REMEDY = "continue without the session API: changes are checked when they land"


class SessionApi(Protocol):
    """Handles session requests."""

    async def handle(self, session: SessionName, command: str, arguments: JsonObject) -> JsonObject:
        """Return the result of a command of `orchestrator.client.commands`.

        A RefusedError is reported to the client. The call is cancelled when the client disconnects.
        """

    def hold_slot(self, session: SessionName) -> AbstractAsyncContextManager[None]:
        """Hold a slot for a heavy command during the block; wait for one. Raises RefusedError."""


@dataclass(frozen=True, slots=True)
class SessionSocket:
    """A session's access to the session API.

    `reach` is the access that the sandbox must allow. `faults` collects internal errors as they occur.
    """

    folder: Path
    reach: PathAccess
    faults: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The `council` program, bound to the session."""
        return str(self.folder / _PROGRAM)

    def extend_environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """Add the session socket to an environment, and our `council` first on PATH."""
        path = [str((self.folder / _PROGRAM).parent), *([env["PATH"]] if env.get("PATH") else [])]
        return {**env, SESSION_VARIABLE: str(self.folder), "PATH": os.pathsep.join(path)}

    @property
    def server(self) -> McpServer | None:
        """Our own MCP server; None if its SDK is not installed."""
        if find_spec("mcp") is None:
            return None
        return McpServer(MCP_SERVER_NAME, (self.command, "mcp"))

    def hook(self, name: Literal["pre-edit", "post-tool", "stop"]) -> tuple[str, ...]:
        """Return the command of a hook."""
        return (str(self.folder / _POST_TOOL),) if name == "post-tool" else (self.command, "hook", name)


@asynccontextmanager
async def open_session_socket(worktree: Worktree, session_service: SessionApi) -> AsyncIterator[SessionSocket]:
    """Serve the requests of a session during the block. Raises OSError."""
    folder, token = worktree.socket_folder, token_hex(16)
    await anyio.to_thread.run_sync(_create_folder, worktree, token)
    session_socket = SessionSocket(folder, PathAccess(readable=(without_dotdot(folder), *internal_program_folders())))
    name = SessionName(worktree.run, worktree.task, worktree.attempt)
    handler = _RequestHandler(name, token, worktree.tree, worktree.lock, session_service, session_socket.faults)
    try:
        async with await _listen(folder) as listener, run_in_background(partial(_serve, listener, handler)):
            yield session_socket
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(remove_session_socket, worktree)


def remove_session_socket(worktree: Worktree) -> None:
    """Remove the session socket; the session's folder may be preserved. Blocks."""
    shutil.rmtree(worktree.socket_folder, ignore_errors=True)


def _create_folder(worktree: Worktree, token: str) -> None:
    folder = worktree.socket_folder
    command = folder / _PROGRAM
    command.parent.mkdir(mode=0o700, parents=True)
    card = os.open(folder / SESSION_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(card, "w", encoding="utf-8") as file:
        json.dump({"token": token, "tree": str(worktree.tree)}, file)
    argv, env = internal_program("orchestrator.__main__", "main")
    env = {**env, SESSION_VARIABLE: str(folder)}
    settings = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())
    _write_program(command, f'{settings}exec {shlex.join(argv)} "$@"')
    # Most calls end here: starting Python after each tool call would take most of a core with 30 sessions.
    call = shlex.join((str(command), "hook", "post-tool"))
    _write_program(folder / _POST_TOOL, f"[ ! -e {shlex.quote(str(worktree.message_file))} ] || exec {call}")


def _write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o700)


async def _listen(folder: Path) -> anyio.abc.SocketListener:
    with ShortSocketPath(str(folder)) as short:
        return await anyio.create_unix_listener(f"{short}/{SOCKET_NAME}", mode=0o600, backlog=_BACKLOG)


@dataclass(frozen=True, slots=True)
class _RequestHandler:
    """Passes the requests of one session to the session API."""

    session: SessionName
    token: str
    tree: Path
    lock: Path
    session_service: SessionApi
    faults: list[str]
    pending_reads: dict[anyio.abc.SocketStream, anyio.CancelScope] = field(default_factory=dict)
    """The session's connections that have not sent a whole line, oldest first."""
    active: set[anyio.abc.SocketStream] = field(default_factory=set)
    foreign: set[anyio.abc.SocketStream] = field(default_factory=set)

    async def handle(self, line: bytes, held: AsyncExitStack) -> JsonObject:
        """Return the response to a request; `held` is for what lasts until the client disconnects.

        Raises nothing but cancellation.
        """
        try:
            read = partial(read_request, line, self.token, self.tree)
            request = read() if len(line) <= _MAX_INLINE_BYTES else await anyio.to_thread.run_sync(read)
            if request.command == HOLD_SLOT.name:
                await held.enter_async_context(self.session_service.hold_slot(self.session))
                return _HELD
            return {
                "ok": True,
                "result": await self.session_service.handle(self.session, request.command, request.arguments),
            }
        except RefusedError as refused:
            return _refusal(refused.message, refused.remedy)
        except CouncilError as error:
            return _refusal(str(error), _FAULT_REMEDY)
        except Exception as error:  # noqa: BLE001  an internal error must not end the session
            if len(self.faults) < _MAX_FAULTS:
                self.faults.append(f"{type(error).__name__}: {error}")
            return _refusal(_FAULT, _FAULT_REMEDY)


#: The response of a request whose result lasts until the client disconnects.
_HELD: JsonObject = {"ok": True, "result": {}}


def _refusal(message: str, remedy: str) -> JsonObject:
    return {"ok": False, "error": message, "remedy": remedy}


async def _serve(listener: anyio.abc.SocketListener, handler: _RequestHandler) -> None:
    async with anyio.create_task_group() as group:
        while True:
            stream = await accept_connection(listener)
            connected = stream.extra(anyio.abc.SocketAttribute.raw_socket)  # noqa: S610  no Django
            is_ours = await anyio.to_thread.run_sync(belongs_to_session, connected, handler.lock)
            if not is_ours and len(handler.foreign) == _MAX_FOREIGN_CONNECTIONS:
                await stream.aclose()
            else:
                group.start_soon(_serve_connection, stream, handler, is_ours)
            await anyio.lowlevel.checkpoint()


async def _serve_connection(stream: anyio.abc.SocketStream, handler: _RequestHandler, is_ours: bool) -> None:
    """Serve one connection; drop slow and disconnected clients."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError):
        async with stream:
            await (_handle_request(stream, handler) if is_ours else _refuse_connection(stream, handler))


async def _refuse_connection(stream: anyio.abc.SocketStream, handler: _RequestHandler) -> None:
    """Reject a process that does not belong to the session."""
    handler.foreign.add(stream)
    try:
        with anyio.move_on_after(_FOREIGN_TIMEOUT):
            await _read_line(stream)
            message = "the request is not from this session: the session did not start this process"
            await stream.send(_encoded(_refusal(message, OWN_COMMAND_REMEDY)))
    finally:
        handler.foreign.discard(stream)


async def _handle_request(stream: anyio.abc.SocketStream, handler: _RequestHandler) -> None:
    line = await _receive_request(stream, handler)
    if line is None:
        return
    response: JsonObject | None = None
    if len(handler.active) >= _MAX_CONNECTIONS:
        response = _refusal(
            f"{_MAX_CONNECTIONS} requests of this session are active, the maximum", "retry after one has finished"
        )
    else:
        handler.active.add(stream)
        try:
            async with anyio.create_task_group() as group, AsyncExitStack() as held:
                group.start_soon(_cancel_on_disconnect, stream, group.cancel_scope)
                response = await _respond(line, handler, held)
                if response is _HELD:
                    response = None
                    await stream.send(_encoded(_HELD))
                    await anyio.sleep_forever()  # until the client disconnects
                group.cancel_scope.cancel()
        finally:
            handler.active.discard(stream)
    if response is not None:
        with anyio.move_on_after(_REQUEST_TIMEOUT):
            await stream.send(_encoded(response))


async def _receive_request(stream: anyio.abc.SocketStream, handler: _RequestHandler) -> bytes | None:
    """Return a connection's line; None on timeout or if a newer one replaces it."""
    if len(handler.pending_reads) >= _MAX_CONNECTIONS:
        oldest = next(iter(handler.pending_reads))
        handler.pending_reads.pop(oldest).cancel()
    with anyio.move_on_after(_REQUEST_TIMEOUT) as scope:
        handler.pending_reads[stream] = scope
        try:
            return await _read_line(stream)
        finally:
            handler.pending_reads.pop(stream, None)
    return None


async def _respond(line: bytes, handler: _RequestHandler, held: AsyncExitStack) -> JsonObject:
    if len(line) > MAX_REQUEST_BYTES:
        return _refusal(f"the request is larger than {MAX_REQUEST_BYTES} bytes", "send a smaller request")
    return await handler.handle(line, held)


def _encoded(response: JsonObject) -> bytes:
    try:
        return json.dumps(response, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError):
        return json.dumps(_refusal(_FAULT, _FAULT_REMEDY)).encode() + b"\n"


async def _read_line(stream: anyio.abc.SocketStream) -> bytes:
    """Return the bytes before the first line break, or more bytes than the limit.

    Raises EndOfStream if the client disconnects first.
    """
    got = bytearray()
    while len(got) <= MAX_REQUEST_BYTES:
        got += await stream.receive()
        if b"\n" in got:
            return bytes(got.partition(b"\n")[0])
    return bytes(got)


async def _cancel_on_disconnect(stream: anyio.abc.SocketStream, waiting: anyio.CancelScope) -> None:
    """Cancel the response when the client disconnects, or sends more than one line."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError):
        await stream.receive()
    waiting.cancel()
