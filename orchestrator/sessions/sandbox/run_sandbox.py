"""Sandbox of a run, applied to its sessions and checks."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
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
from orchestrator.domain.settings.run_settings import PathAccess, SandboxSettings
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.sandbox.policy import (
    REPLACED_FOLDERS,
    ProxyEndpoint,
    SandboxKind,
    SandboxPolicy,
    sandbox_command,
)
from orchestrator.sessions.sandbox.proxy import Proxy
from orchestrator.sessions.socket.peers import belongs_to_session
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand
from orchestrator.system.background import run_in_background

#: The port on a private loopback, above the kernel's ephemeral ports.
_PORT: Final = 61080
_RETRY_INTERVAL: Final = 0.1  # seconds
_OWN_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_EXCEPTIONS: Final = ("NO_PROXY", "no_proxy")


@dataclass(frozen=True, slots=True)
class SandboxScope:
    """The absolute paths that a program can write and read, and its private folder."""

    writable: tuple[Path, ...]
    readable: tuple[Path, ...]
    scratch: Path

    @classmethod
    def of(cls, worktree: Worktree) -> SandboxScope:
        """Return the scope of an attempt: its files, git directory, prompt and handoff."""
        readable = (worktree.prompt_file, worktree.hub.objects)
        return cls((worktree.tree, worktree.git_dir, worktree.handoff_file.parent), readable, worktree.scratch)


@dataclass(frozen=True, slots=True)
class SandboxedCommand:
    """A sandboxed command, and the hosts denied by its proxy, as `host:port`."""

    command: SupervisedCommand
    denied: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class RunSandbox:
    """The sandbox of a run, with the paths that are `hidden` from all sessions."""

    kind: SandboxKind
    hidden: tuple[Path, ...]
    config: SandboxSettings

    @asynccontextmanager
    async def apply(
        self, scope: SandboxScope, command: SupervisedCommand, reach: PathAccess
    ) -> AsyncIterator[SandboxedCommand]:
        """Yield the command with a sandbox that allows access to `scope` and `reach`.

        Run the command within the block, because its network access ends with the block. Raises OSError if the sandbox
        can't be set up.
        """
        command = replace(command, limits=self.config.limits.by_resource)
        if not self.config.hosts:
            yield SandboxedCommand(await self._sandbox(scope, command, reach))
            return
        async with run_proxy(self.kind, self.config.hosts, scope.scratch, command) as proxied:
            command, endpoint, denied = proxied
            yield SandboxedCommand(await self._sandbox(scope, command, reach, endpoint), denied)

    async def _sandbox(
        self, scope: SandboxScope, command: SupervisedCommand, reach: PathAccess, endpoint: ProxyEndpoint | None = None
    ) -> SupervisedCommand:
        allowed = self.config.access | reach
        policy = SandboxPolicy(
            writable=(*scope.writable, *allowed.writable),
            readable=(*scope.readable, *allowed.readable),
            hidden=self.hidden,
            scratch=scope.scratch,
            network=self.config.has_network,
            proxy_endpoint=endpoint,
            nesting=self.config.nested_sandboxes,
        )
        return await anyio.to_thread.run_sync(partial(sandbox_command, self.kind, command, policy))

    def explain_missing_program(self, program: str, environ: Mapping[str, str], reach: PathAccess) -> str:
        """Return a hint if a program is only hidden from sessions; otherwise ""."""
        hidden = self.find_hidden_folders(program, environ, reach)
        return f" (hidden from sessions: {', '.join(hidden)}; add them to `readable`)" if hidden else ""

    def find_hidden_folders(self, program: str, environ: Mapping[str, str], reach: PathAccess) -> list[str]:
        """Return the folders of a program on PATH that are hidden from sessions."""
        found = shutil.which(program, path=environ.get("PATH"))
        if found is None or self.kind is SandboxKind.OFF:
            return []
        paths = {Path(found).absolute(), Path(found).resolve()}
        allowed = (*self.config.access.writable, *self.config.access.readable, *reach.writable, *reach.readable)
        covered = (*self.hidden, *(map(Path, REPLACED_FOLDERS) if self.kind is SandboxKind.BUBBLEWRAP else ()))
        return sorted({str(path.parent) for path in paths if _is_in(path, covered) and not _is_in(path, allowed)})


def _is_in(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


@asynccontextmanager
async def run_proxy(
    kind: SandboxKind, hosts: Sequence[str], scratch: Path, command: SupervisedCommand
) -> AsyncIterator[tuple[SupervisedCommand, ProxyEndpoint, Collection[str]]]:
    """Run a proxy to `hosts` for a command during the block.

    Yields the command that uses the proxy, the proxy's endpoint, and the hosts denied so far, as `host:port`.
    `scratch` is the session's folder for temporary files. The command gets the token in its environment; it is redacted
    in the output. Raises OSError if the proxy can't listen.
    """
    proxy = Proxy(hosts)
    if kind is SandboxKind.LANDLOCK:
        listening = socket.create_server(("127.0.0.1", 0))
        endpoint = ProxyEndpoint(listening.getsockname()[1])
        async with run_in_background(partial(_serve, proxy, listening)):
            yield _with_proxy(command, proxy, endpoint.port, ()), endpoint, proxy.denied.keys()
        return
    socket_path = scratch / f".council-{token_hex(8)}"
    endpoint = ProxyEndpoint(_PORT, socket_path)
    await anyio.to_thread.run_sync(partial(scratch.mkdir, mode=0o700, parents=True, exist_ok=True))
    try:
        with ShortSocketPath(str(scratch), socket_path.name) as folder:
            listener = await anyio.create_unix_listener(f"{folder}/{socket_path.name}", mode=0o600)
        async with run_in_background(partial(_serve_inside, proxy, listener, command.lock)):
            yield _with_proxy(command, proxy, endpoint.port, _OWN_LOOPBACK), endpoint, proxy.denied.keys()
    finally:
        with suppress(OSError):
            socket_path.unlink()


def _with_proxy(command: SupervisedCommand, proxy: Proxy, port: int, direct: Sequence[str]) -> SupervisedCommand:
    env = {name: value for name, value in command.env.items() if name not in _EXCEPTIONS}
    secrets = "|".join(map(re.escape, proxy.secrets))
    redact = secrets if command.redact is None else f"{command.redact}|{secrets}"
    return replace(command, env={**env, **proxy.variables(port, direct)}, redact=redact)


async def _serve(proxy: Proxy, listening: socket.socket) -> None:
    await proxy.serve(await anyio.abc.SocketListener.from_socket(listening))


async def _serve_inside(proxy: Proxy, receiver: anyio.abc.SocketListener, lock: Path) -> None:
    """Serve on the socket passed by the first process of the session with this `lock`."""
    async with receiver:
        listening = await _receive_listener(receiver, lock)
    await _serve(proxy, listening)


async def _receive_listener(receiver: anyio.abc.SocketListener, lock: Path) -> socket.socket:
    while True:
        with suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
            async with await receiver.accept() as stream:
                connected = stream.extra(anyio.abc.SocketAttribute.raw_socket)  # noqa: S610  no Django
                assert isinstance(stream, anyio.abc.UNIXSocketStream)  # noqa: S101  (what such a listener accepts)
                if await anyio.to_thread.run_sync(belongs_to_session, connected, lock):
                    _, descriptors = await stream.receive_fds(1, 1)
                    listening = socket.socket(fileno=descriptors[0])
                    listening.setblocking(False)
                    return listening
        await anyio.sleep(_RETRY_INTERVAL)
