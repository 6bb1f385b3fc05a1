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
from orchestrator.repo.worktrees.pool import Checkout, Pool
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.output.files import log_file
from orchestrator.sessions.sandbox.scope import Fencing, Ground
from orchestrator.sessions.setup.environment import attempt_variables, base_environment
from orchestrator.sessions.setup.shell import CommandFailed, Done, NotRun, Shell, ShellCommand, Stopped
from orchestrator.sessions.setup.worktree_setup import Equipment, Provided, SetupFailed
from orchestrator.system.failpoints import failpoint


@dataclass(frozen=True, slots=True)
class Passed:
    """Every command ended with zero."""


@dataclass(frozen=True, slots=True)
class Unchecked:
    """The checks did not come to an end: they were stopped, or could not be started."""

    reason: str


_STOPPED = "the checks were stopped"

CheckResult = Passed | CommandFailed | Unchecked


@dataclass(slots=True)
class Checks:
    """The commands for one merge; `timeout` in seconds for each of them."""

    pool: Pool
    equipment: Equipment
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

    async def run(self, commit: str, base: str) -> CheckResult:
        """Check `commit` out and run the commands in turn, up to the first that fails; nothing of it is left.

        `base` is the commit that it builds on, which the target holds.
        """
        checkout = None
        try:
            with self._running:
                checkout = await self.pool.take_to_check(commit, base, self.worktree.root)
                with anyio.CancelScope(shield=True):
                    self.worktree = await worktrees.create(self.worktree, checkout, "")
                provided = await self.equipment.provide(checkout)
                if not isinstance(provided, Provided):
                    return Unchecked(f"the checks could not be set up: {provided.reason}")
                return await self._run_all(provided)
            return Unchecked(_STOPPED)
        except SetupFailed as failed:
            # What the merge changed may be what the setup depends on.
            return failed.ended if isinstance(failed.ended, CommandFailed) else Unchecked(str(failed))
        except (GitError, OSError, RefusedError) as error:
            return Unchecked(f"the checks could not be set up: {error}")
        finally:
            with anyio.CancelScope(shield=True):
                await self._give_back(checkout)

    async def _give_back(self, checkout: Checkout | None) -> None:
        if checkout is not None:
            found = await checkout.compare()
            await worktrees.leave(self.worktree)
            self.pool.give_back(checkout, found)

    async def _run_all(self, provided: Provided) -> CheckResult:
        shell = self._shell(provided)
        by = f".{self.worktree.by}" if self.worktree.by else ""
        for number, text in enumerate(self.commands, start=1):
            log = log_file(self.logs, self.worktree.task, self.worktree.attempt, f"check{number}{by}")
            ended = await shell.run(ShellCommand(text, log, self.timeout, "checks_timeout"))
            failpoint("check.ended")
            match ended:
                case CommandFailed():
                    return ended
                case Stopped():
                    return Unchecked(_STOPPED)
                case NotRun(reason):
                    return Unchecked(f"the check was not run: {reason}")
                case Done():
                    continue
                case _:
                    assert_never(ended)
        return Passed()

    def _shell(self, provided: Provided) -> Shell:
        place = self.worktree
        variables = {**provided.variables, **attempt_variables(place)}
        environment = base_environment(self.env, self.environ, place.tree, variables)
        return Shell(self.fencing, Ground.of(place), place.tree, place.lock, environment, self.redactor, provided.reach)
