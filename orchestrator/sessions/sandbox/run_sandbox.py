"""Sandbox of a run, applied to its sessions and checks."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio.to_thread

from orchestrator.domain.settings.run_settings import PathAccess, SandboxSettings
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.sandbox.policy import (
    REPLACED_FOLDERS,
    ProxyEndpoint,
    SandboxKind,
    SandboxPolicy,
    sandbox_command,
)
from orchestrator.sessions.sandbox.session_proxy import run_proxy
from orchestrator.sessions.supervision.supervisor_client import SupervisedCommand


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
            yield SandboxedCommand(
                await self._sandbox(scope, proxied.command, reach, proxied.proxy_endpoint), proxied.denied.keys()
            )

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
