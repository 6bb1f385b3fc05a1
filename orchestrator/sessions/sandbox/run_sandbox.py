"""What the sessions and checks of one run are fenced in by."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio.to_thread

from orchestrator.config.model import PathAccess, SandboxConfig
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
    """What a program works on: absolute paths that it may write, and others to read; `scratch` is its own folder."""

    writable: tuple[Path, ...]
    readable: tuple[Path, ...]
    scratch: Path

    @classmethod
    def of(cls, worktree: Worktree) -> SandboxScope:
        """Return what each program of an attempt needs: its files, git directory, prompt, and handoff."""
        readable = (worktree.prompt_file, worktree.hub.objects)
        return cls((worktree.tree, worktree.git_dir, worktree.handoff_file.parent), readable, worktree.scratch)


@dataclass(frozen=True, slots=True)
class SandboxedCommand:
    """A command in its sandbox; `denied` grows with the hosts that it is refused, as `host:port`."""

    command: SupervisedCommand
    denied: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class RunSandbox:
    """The sandbox of a run: `hidden` is what no session is to see, the rest as the config has it."""

    kind: SandboxKind
    hidden: tuple[Path, ...]
    config: SandboxConfig

    @asynccontextmanager
    async def around(
        self, ground: SandboxScope, command: SupervisedCommand, reach: PathAccess
    ) -> AsyncIterator[SandboxedCommand]:
        """Yield the command so that it reaches the ground that it works on, and what `reach` adds.

        It is to be run within the block: what it reaches of the network ends with that. Raises OSError.
        """
        command = replace(command, limits=self.config.limits.by_resource)
        if not self.config.hosts:
            yield SandboxedCommand(await self._fenced(ground, command, reach))
            return
        async with run_proxy(self.kind, self.config.hosts, ground.scratch, command) as found:
            yield SandboxedCommand(
                await self._fenced(ground, found.command, reach, found.proxy_endpoint), found.denied.keys()
            )

    async def _fenced(
        self, ground: SandboxScope, command: SupervisedCommand, reach: PathAccess, inlet: ProxyEndpoint | None = None
    ) -> SupervisedCommand:
        allowed = self.config.reach | reach
        fence = SandboxPolicy(
            writable=(*ground.writable, *allowed.writable),
            readable=(*ground.readable, *allowed.readable),
            hidden=self.hidden,
            scratch=ground.scratch,
            network=self.config.network,
            proxy_endpoint=inlet,
            nesting=self.config.nesting,
        )
        return await anyio.to_thread.run_sync(partial(sandbox_command, self.kind, command, fence))

    def explain_missing_program(self, program: str, environ: Mapping[str, str], reach: PathAccess) -> str:
        """Return what to do about a program that is there but not for sessions; empty if that is not so."""
        found = shutil.which(program, path=environ.get("PATH"))
        if found is None or self.kind is SandboxKind.OFF:
            return ""
        places = {Path(found).absolute(), Path(found).resolve()}
        allowed = (*self.config.reach.writable, *self.config.reach.readable, *reach.writable, *reach.readable)
        covered = (*self.hidden, *(map(Path, REPLACED_FOLDERS) if self.kind is SandboxKind.BUBBLEWRAP else ()))
        hidden = sorted({place.parent for place in places if _is_in(place, covered) and not _is_in(place, allowed)})
        if not hidden:
            return ""
        return f" ({', '.join(map(str, hidden))} is hidden from sessions: name it under `readable`)"


def _is_in(place: Path, folders: Iterable[Path]) -> bool:
    return any(place.is_relative_to(folder) for folder in folders)
