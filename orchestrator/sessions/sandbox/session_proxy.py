"""Run a session's proxy where the session reaches it, and nobody else.

With bubblewrap the session has a loopback of its own: a program that starts the session there
(`orchestrator.sandbox.loopback`) passes us a socket that listens on it. With Landlock the session shares the machine's
network, of which it can connect to the port of the proxy only.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Final

import anyio
import anyio.abc
import anyio.to_thread

from orchestrator.client.session import ShortSocketPath
from orchestrator.sessions.sandbox.policy import ProxyEndpoint, SandboxKind
from orchestrator.sessions.sandbox.proxy import Proxy
from orchestrator.sessions.socket.connections import run_in_background
from orchestrator.sessions.socket.peers import belongs_to_session
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand

#: The port on a loopback of the session's own; above those that the kernel gives to programs by itself.
_PORT: Final = 61080
_REST: Final = 0.1  # seconds until the next try
_OWN_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_EXCEPTIONS: Final = ("NO_PROXY", "no_proxy")


@dataclass(frozen=True, slots=True)
class ProxiedCommand:
    """A command that uses a proxy; `denied` are the hosts that were refused so far, as `host:port`."""

    command: SupervisedCommand
    proxy_endpoint: ProxyEndpoint
    denied: Mapping[str, None]


@asynccontextmanager
async def run_proxy(
    kind: SandboxKind, hosts: Sequence[str], scratch: Path, command: SupervisedCommand
) -> AsyncIterator[ProxiedCommand]:
    """Run a proxy to `hosts` for a command during the block. Raises OSError.

    `scratch` is the session's folder for temporary files. The token is in the command's environment, and is redacted in
    its output.
    """
    proxy = Proxy(hosts)
    if kind is SandboxKind.LANDLOCK:
        listening = socket.create_server(("127.0.0.1", 0))
        inlet = ProxyEndpoint(listening.getsockname()[1])
        async with run_in_background(partial(_serve, proxy, listening)):
            yield ProxiedCommand(_with_proxy(command, proxy, inlet.port, ()), inlet, proxy.denied)
        return
    meeting = scratch / f".council-{token_hex(8)}"
    inlet = ProxyEndpoint(_PORT, meeting)
    await anyio.to_thread.run_sync(partial(scratch.mkdir, mode=0o700, parents=True, exist_ok=True))
    try:
        with ShortSocketPath(str(scratch), meeting.name) as folder:
            listener = await anyio.create_unix_listener(f"{folder}/{meeting.name}", mode=0o600)
        async with run_in_background(partial(_serve_inside, proxy, listener, command.lock)):
            yield ProxiedCommand(_with_proxy(command, proxy, inlet.port, _OWN_LOOPBACK), inlet, proxy.denied)
    finally:
        with suppress(OSError):
            meeting.unlink()


def _with_proxy(command: SupervisedCommand, proxy: Proxy, port: int, direct: Sequence[str]) -> SupervisedCommand:
    kept = {name: value for name, value in command.env.items() if name not in _EXCEPTIONS}
    secrets = "|".join(map(re.escape, proxy.secrets))
    redact = secrets if command.redact is None else f"{command.redact}|{secrets}"
    return replace(command, env={**kept, **proxy.variables(port, direct)}, redact=redact)


async def _serve(proxy: Proxy, listening: socket.socket) -> None:
    await proxy.serve(await anyio.abc.SocketListener.from_socket(listening))


async def _serve_inside(proxy: Proxy, meeting: anyio.abc.SocketListener, lock: Path) -> None:
    """Serve on the socket that is passed on by the first process of the session that `lock` belongs to."""
    async with meeting:
        listening = await _receive_listener(meeting, lock)
    await _serve(proxy, listening)


async def _receive_listener(meeting: anyio.abc.SocketListener, lock: Path) -> socket.socket:
    while True:
        with suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
            async with await meeting.accept() as stream:
                connected = stream.extra(anyio.abc.SocketAttribute.raw_socket)
                assert isinstance(stream, anyio.abc.UNIXSocketStream)
                if await anyio.to_thread.run_sync(belongs_to_session, connected, lock):
                    _, descriptors = await stream.receive_fds(1, 1)
                    listening = socket.socket(fileno=descriptors[0])
                    listening.setblocking(False)
                    return listening
        await anyio.sleep(_REST)
