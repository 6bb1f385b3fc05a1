"""Check a merged tree: user commands on agents' code, so sandboxed like agents.

Only their exit status and output leave the sandbox.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, assert_never

import anyio
import anyio.to_thread

from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.run_settings import Check
from orchestrator.errors import GitError, RefusedError
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.checkouts import HeldSlot
from orchestrator.repo.worktrees.pool import CheckPool
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.junit import read_failed_tests, stamp_report
from orchestrator.sessions.output.log_files import log_path
from orchestrator.sessions.sandbox.run_sandbox import RunSandbox, SandboxScope
from orchestrator.sessions.setup.environment import build_base_environment, identifying_variables
from orchestrator.sessions.setup.shell import (
    CommandFailed,
    CommandNotRun,
    CommandStopped,
    CommandSucceeded,
    Shell,
    ShellCommand,
    ShellResult,
)
from orchestrator.sessions.setup.worktree_setup import PreparedWorktree, SetupFailed, WorktreeSetup
from orchestrator.system.failpoints import failpoint


@dataclass(frozen=True, slots=True)
class ChecksPassed:
    """Every command succeeded."""


@dataclass(frozen=True, slots=True)
class EndedCheck:
    """A command that succeeded or failed, how long it took in seconds, and its log."""

    command: str
    seconds: float
    log: Path
    failure: CommandFailed | None


@dataclass(frozen=True, slots=True)
class ChecksNotRun:
    """The checks did not finish: they were stopped or could not be started."""

    reason: str


CHECKS_STOPPED: Final = ChecksNotRun("the checks were stopped")

CheckResult = ChecksPassed | CommandFailed | ChecksNotRun


@dataclass(slots=True)
class CheckRunner:
    """Runs the check commands of one merge; `timeout` is in seconds per command."""

    pool: CheckPool
    worktree_setup: WorktreeSetup
    worktree: Worktree
    checks: Sequence[Check]
    timeout: float
    env: Sequence[str]
    sandbox: RunSandbox
    redactor: Redactor
    logs: Path
    environ: Mapping[str, str]

    async def run(self, commit: str, base: str, ended: Callable[[EndedCheck], Awaitable[None]]) -> CheckResult:
        """Check out `commit`, run the commands in order until one fails, and clean up.

        `base` is its parent commit on the target. Calls `ended` after each command that succeeds or fails.
        """
        checkout = None
        try:
            checkout = await self.pool.acquire(commit, base, self.worktree.root)
            with anyio.CancelScope(shield=True):
                self.worktree = await worktrees.create_worktree(self.worktree, checkout, "")
            prepared = await self.worktree_setup.prepare(checkout)
            if not isinstance(prepared, PreparedWorktree):
                return ChecksNotRun(f"the checks could not be set up: {prepared.reason}")
            return await self._run_all(prepared, ended)
        except SetupFailed as failed:
            # The merge may have broken a file that the setup depends on.
            return failed.result if isinstance(failed.result, CommandFailed) else ChecksNotRun(str(failed))
        except (GitError, OSError, RefusedError) as error:
            return ChecksNotRun(f"the checks could not be set up: {error}")
        finally:
            with anyio.CancelScope(shield=True):
                await self._release(checkout)

    async def _release(self, checkout: HeldSlot | None) -> None:
        if checkout is not None:
            diff = await checkout.compare()
            await worktrees.remove_session_folder(self.worktree)
            self.pool.release(checkout, diff)

    async def _run_all(self, prepared: PreparedWorktree, ended: Callable[[EndedCheck], Awaitable[None]]) -> CheckResult:
        shell = self._shell(prepared)
        suffix = f".{self.worktree.checker}" if self.worktree.checker else ""
        for number, check in enumerate(self.checks, start=1):
            log = log_path(self.logs, self.worktree.task, self.worktree.attempt, f"check{number}{suffix}")
            began = anyio.current_time()
            result = await self._run_check(shell, check, log)
            failpoint("check.ended")
            match result:
                case CommandStopped():
                    return CHECKS_STOPPED
                case CommandNotRun(reason):
                    return ChecksNotRun(f"the check was not run: {reason}")
                case CommandSucceeded() | CommandFailed():
                    failure = result if isinstance(result, CommandFailed) else None
                    with anyio.CancelScope(shield=True):
                        await ended(EndedCheck(check.run, anyio.current_time() - began, log, failure))
                    if failure is not None:
                        return failure
                case _:
                    assert_never(result)
        return ChecksPassed()

    async def _run_check(self, shell: Shell, check: Check, log: Path) -> ShellResult:
        command, tree = ShellCommand(check.run, log, self.timeout, "checks_timeout"), self.worktree.tree
        if check.report is None:
            return await shell.run(command)
        before = await anyio.to_thread.run_sync(stamp_report, tree, check.report)
        result = await shell.run(command)
        # A report that the command did not write was committed, or is of an earlier command.
        after = await anyio.to_thread.run_sync(stamp_report, tree, check.report)
        if not isinstance(result, CommandFailed) or after == before:
            return result
        return replace(result, failed_tests=await anyio.to_thread.run_sync(read_failed_tests, tree, check.report))

    def _shell(self, prepared: PreparedWorktree) -> Shell:
        worktree = self.worktree
        variables = {**prepared.variables, **identifying_variables(worktree)}
        environment = build_base_environment(self.env, self.environ, worktree.tree, variables)
        scope = SandboxScope.of(worktree)
        return Shell(self.sandbox, scope, worktree.tree, worktree.lock, environment, self.redactor, prepared.reach)
