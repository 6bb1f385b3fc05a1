"""The checks of a merged tree: commands of the user's on code that agents wrote, so fenced in as agents are.

Only their exit status and what they print crosses back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

import anyio

from orchestrator.domain.security.secrets import Redactor
from orchestrator.errors import GitError, RefusedError
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.pool import HeldSlot, SlotPool
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.log_files import log_path
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.setup.environment import attempt_variables, build_base_environment
from orchestrator.sessions.setup.shell import (
    CommandFailed,
    CommandNotRun,
    CommandStopped,
    CommandSucceeded,
    Shell,
    ShellCommand,
)
from orchestrator.sessions.setup.worktree_setup import PreparedWorktree, SetupFailed, WorktreeSetup
from orchestrator.system.failpoints import failpoint


@dataclass(frozen=True, slots=True)
class ChecksPassed:
    """Every command ended with zero."""


@dataclass(frozen=True, slots=True)
class ChecksNotRun:
    """The checks did not come to an end: they were stopped, or could not be started."""

    reason: str


_STOPPED = "the checks were stopped"

CheckResult = ChecksPassed | CommandFailed | ChecksNotRun


@dataclass(slots=True)
class CheckRunner:
    """The commands for one merge; `timeout` in seconds for each of them."""

    pool: SlotPool
    worktree_setup: WorktreeSetup
    worktree: Worktree
    commands: Sequence[str]
    timeout: float
    env: Sequence[str]
    sandbox: RunSandbox
    redactor: Redactor
    logs: Path
    environ: Mapping[str, str]
    _running: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)

    def stop(self) -> None:
        """End the command that runs, and all that it started; `run` then says so."""
        self._running.cancel()

    async def run(self, commit: str, base: str) -> CheckResult:
        """Check `commit` out and run the commands in turn, up to the first that fails; nothing of it is left.

        `base` is the commit that it builds on, which the target holds.
        """
        checkout = None
        try:
            with self._running:
                checkout = await self.pool.acquire_for_check(commit, base, self.worktree.root)
                with anyio.CancelScope(shield=True):
                    self.worktree = await worktrees.create_worktree(self.worktree, checkout, "")
                provided = await self.worktree_setup.prepare(checkout)
                if not isinstance(provided, PreparedWorktree):
                    return ChecksNotRun(f"the checks could not be set up: {provided.reason}")
                return await self._run_all(provided)
            return ChecksNotRun(_STOPPED)
        except SetupFailed as failed:
            # What the merge changed may be what the setup depends on.
            return failed.ended if isinstance(failed.ended, CommandFailed) else ChecksNotRun(str(failed))
        except (GitError, OSError, RefusedError) as error:
            return ChecksNotRun(f"the checks could not be set up: {error}")
        finally:
            with anyio.CancelScope(shield=True):
                await self._give_back(checkout)

    async def _give_back(self, checkout: HeldSlot | None) -> None:
        if checkout is not None:
            found = await checkout.compare()
            await worktrees.remove_session_folder(self.worktree)
            self.pool.release(checkout, found)

    async def _run_all(self, provided: PreparedWorktree) -> CheckResult:
        shell = self._shell(provided)
        by = f".{self.worktree.checker}" if self.worktree.checker else ""
        for number, text in enumerate(self.commands, start=1):
            log = log_path(self.logs, self.worktree.task, self.worktree.attempt, f"check{number}{by}")
            ended = await shell.run(ShellCommand(text, log, self.timeout, "checks_timeout"))
            failpoint("check.ended")
            match ended:
                case CommandFailed():
                    return ended
                case CommandStopped():
                    return ChecksNotRun(_STOPPED)
                case CommandNotRun(reason):
                    return ChecksNotRun(f"the check was not run: {reason}")
                case CommandSucceeded():
                    continue
                case _:
                    assert_never(ended)
        return ChecksPassed()

    def _shell(self, provided: PreparedWorktree) -> Shell:
        place = self.worktree
        variables = {**provided.variables, **attempt_variables(place)}
        environment = build_base_environment(self.env, self.environ, place.tree, variables)
        return Shell(
            self.sandbox, SandboxScope.of(place), place.tree, place.lock, environment, self.redactor, provided.reach
        )
