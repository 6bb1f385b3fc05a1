"""The checks of a merged tree: commands of the user's on code that agents wrote, so fenced in as agents are.

Only their exit status and what they print crosses back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.config.model import Reach
from orchestrator.domain.secrets import Redactor
from orchestrator.errors import GitError, SessionError
from orchestrator.failpoints import failpoint
from orchestrator.process import kill_marked
from orchestrator.repo import worktrees
from orchestrator.repo.git import Git
from orchestrator.repo.worktrees import Worktree
from orchestrator.sessions.environment import base_environment
from orchestrator.sessions.fencing import Fencing
from orchestrator.sessions.output import OUTPUT_CAP, STOP_GRACE, log_file, read_tail
from orchestrator.sessions.supervised import Ended, SupervisedCommand, run_supervised


@dataclass(frozen=True, slots=True)
class Passed:
    """Every command ended with zero."""


@dataclass(frozen=True, slots=True)
class CheckFailed:
    """A command that did not end with zero: how it ended in words, and the end of what it printed."""

    command: str
    ended: str
    said: str
    log: Path


@dataclass(frozen=True, slots=True)
class Unchecked:
    """The checks did not come to an end: they were stopped, or could not be started."""

    reason: str


_STOPPED = "the checks were stopped"

CheckResult = Passed | CheckFailed | Unchecked


@dataclass(slots=True)
class Checks:
    """The commands for one merge; `timeout` in seconds for each of them."""

    git: Git
    worktree: Worktree
    commands: Sequence[str]
    timeout: float
    env: Sequence[str]
    fencing: Fencing
    redactor: Redactor
    logs: Path
    environ: Mapping[str, str]
    _running: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)

    def stop(self) -> None:
        """End the command that runs, and all that it started; `run` then says so."""
        self._running.cancel()

    async def run(self, commit: str) -> CheckResult:
        """Check `commit` out and run the commands in turn, up to the first that fails; nothing of it is left."""
        try:
            await worktrees.create(self.git, self.worktree, commit, "")
            with self._running:
                return await self._run_all()
            return Unchecked(_STOPPED)
        except SessionError as error:
            await anyio.to_thread.run_sync(kill_marked, self.worktree.marker)
            return Unchecked(str(error))
        except (GitError, OSError) as error:
            return Unchecked(f"the checks could not be set up: {error}")
        finally:
            with anyio.CancelScope(shield=True):
                await worktrees.remove(self.git, self.worktree)

    async def _run_all(self) -> CheckResult:
        for number, command in enumerate(self.commands, start=1):
            log = log_file(self.logs, self.worktree.task, self.worktree.attempt, f"check{number}")
            ended = await self._run_one(command, log)
            failpoint("check.ended")
            if ended.spawn_error is not None:
                return Unchecked(f"the check could not be started: {ended.spawn_error}")
            if ended.ended_by in {"stop", "orphaned"}:
                return Unchecked(_STOPPED)
            if ended.ended_by == "timeout":
                told = f"ran for longer than {self.timeout:g} s, its limit (`checks_timeout`)"
                return CheckFailed(command, told, await read_tail(log), log)
            if ended.signal is not None or ended.exit != 0:
                told = f"ended with exit code {ended.exit}" if ended.signal is None else f"got signal {ended.signal}"
                return CheckFailed(command, told, await read_tail(log), log)
        return Passed()

    async def _run_one(self, command: str, log: Path) -> Ended:
        place = self.worktree
        supervised = SupervisedCommand(
            argv=("sh", "-c", f"exec 2>&1\n{command}"),
            env={**base_environment(self.env, self.environ, place), "HOME": str(place.scratch)},
            cwd=place.tree,
            stdin=None,
            stdout=log,
            stderr=Path(os.devnull),
            cap=OUTPUT_CAP,
            timeout=self.timeout,
            grace=STOP_GRACE,
            lock=place.lock,
            silence=None,
            watched=(),
            redact=self.redactor.bytes_pattern,
        )
        return await run_supervised(await self.fencing.around(place, supervised, Reach()))
