"""Run commands on the base of a run, and find those whose program can't run there."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
from tenacity import AsyncRetrying, retry_if_result, stop_after_attempt, wait_exponential

from orchestrator.domain.scheduling.claims import OwnerStatus
from orchestrator.domain.sessions.shell_commands import (
    find_programs,
    is_in_worktree,
    is_of_environment,
    make_lookup_command,
    may_create,
)
from orchestrator.domain.settings.run_settings import Check, TaskSpec
from orchestrator.engine.checks.check_runs import CheckRequest, CheckRuns
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import LockHeld
from orchestrator.sessions.setup.checks import CheckResult, ChecksNotRun, ChecksPassed
from orchestrator.sessions.setup.shell import CommandFailed, UnrunnableProgram, describe_unrunnable
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import LockHolder

#: Attempt number for the checks of a base; attempts of tasks start at 1.
_BASE_CHECK_ATTEMPT = 0
#: The maximum number of attempts at checks that could not complete; pauses between them double from one second.
_MAX_TRIES = 4
#: Seconds between polls for the process that checks the base.
_POLL_INTERVAL = 1.0


@dataclass(slots=True)
class BaseCommands:
    """Runs checks of tasks on a base, one process of a machine at a time."""

    ledger: Ledger
    context: RunContext
    runs: CheckRuns
    _unrunnable: dict[tuple[str, tuple[str, ...]], str | None] = field(default_factory=dict, init=False)
    """The reason that one of the commands can't run on a base, by base and commands."""

    @asynccontextmanager
    async def lock(self) -> AsyncIterator[None]:
        """Hold the lock under which only one process of this machine runs base checks.

        Continue without the lock if its holder is suspended or has left the run.
        """
        lock = self.context.hub.lock(f"base-{self.ledger.run.id}")
        async with AsyncExitStack() as stack:
            while True:
                try:
                    await stack.enter_async_context(lock.hold(_POLL_INTERVAL))
                    break
                except LockHeld:
                    if not await _is_working(self.ledger, await anyio.to_thread.run_sync(LockHolder.read, lock.path)):
                        break
            yield

    async def find_unrunnable(
        self, task: str, spec: TaskSpec, commands: Sequence[str], commit: str, *, may_be_added: bool
    ) -> list[CommandFailed]:
        """Return the commands that cannot run on a commit.

        Commands whose program a task may add (`may_be_added`) are omitted. Only checks with a missing program are run,
        because other checks may be slow.
        """
        failures = []
        for command in commands:
            probe = " && ".join(
                self._probe_command(command, program, may_be_added=may_be_added) for program in find_programs(command)
            )
            result = await self._repeat(task, spec, (probe,), commit) if probe else ChecksPassed()
            if isinstance(result, CommandFailed) and result.command == probe:
                result = await self._repeat(task, spec, (command,), commit)
                if isinstance(result, CommandFailed) and (missing := result.unrunnable) is not None:
                    failures += [] if may_be_added and self._may_add(command, missing) else [result]
        return failures

    async def request(self, task: str, spec: TaskSpec, checks: Sequence[Check], commit: str) -> CheckRequest:
        """Return the request for checks of a commit."""
        # A separate folder per process avoids conflicts with leftovers of a killed or suspended process.
        checker = self.ledger.orchestrators.me.id.rpartition("-")[2]
        return await self.runs.request(task, _BASE_CHECK_ATTEMPT, spec, checks, commit, commit, checker)

    async def _repeat(self, task: str, spec: TaskSpec, commands: Sequence[str], commit: str) -> CheckResult:
        """Run commands on a commit, whatever was recorded: their programs may have been removed since."""
        checks = [Check(run=command, cache=False) for command in commands]
        return await self.run(await self.request(task, spec, checks, commit))

    async def run(self, request: CheckRequest) -> CheckResult:
        """Run checks; retry a few times if they could not complete."""

        async def run() -> CheckResult:
            return (await self.runs.run(request)).result

        return await _repeat_unless_run(run, self.context.tools.clock)

    async def explain_unrunnable(
        self, task: str, spec: TaskSpec, commands: tuple[str, ...], failed: CommandFailed, base: str, correction: str
    ) -> str | None:
        """Return the reason why a check which exited with 126 or 127 can never run.

        None if the task may be the cause, because its base has the program. `correction` is the fix for an error in
        the command.
        """
        missing = failed.unrunnable
        if missing is None:
            return None
        is_allowed = spec.allow_failing_base or self.ledger.run.allow_failing_base
        if is_allowed and self._may_add(failed.command, missing):
            return None
        commands = (failed.command,) if is_allowed else commands
        key = (base, (*commands, failed.command))
        if key not in self._unrunnable:
            async with self.lock():
                result = await self._repeat(task, spec, commands, base)
            if isinstance(result, ChecksNotRun):  # may run another time
                return None
            missing_on_base = result.unrunnable if isinstance(result, CommandFailed) else None
            is_missing_there = missing_on_base is not None and not (
                is_allowed and self._may_add(failed.command, missing_on_base)
            )
            self._unrunnable[key] = (
                describe_unrunnable([failed], correction, self.ledger.run.id) if is_missing_there else None
            )
        return self._unrunnable[key]

    def _may_add(self, command: str, missing: UnrunnableProgram) -> bool:
        """Return True if a task may add the missing program of a check."""
        return missing.is_absent and (not missing.needs_new_run or self._is_made(command, missing.program))

    def _is_made(self, command: str, program: str) -> bool:
        """Return True if changed files may produce the program.

        Setup or an earlier part of the command may build it.
        """
        return bool(self.context.worktrees.setup) or may_create(command, program)

    def _probe_command(self, command: str, program: str, *, may_be_added: bool) -> str:
        """Return a shell command that fails if a program cannot run.

        It succeeds if a task may add the program (`may_be_added`).
        """
        if not is_in_worktree(program):
            return make_lookup_command(program)
        name = shlex.quote(program)
        is_made = self._is_made(command, program)
        if not may_be_added or (is_of_environment(program) and not is_made):
            return f"test -x {name}"
        absent = "true" if is_made else f"! git check-ignore --quiet -- {name}"
        return f"if test -e {name}; then test -x {name}; else {absent}; fi"


async def _repeat_unless_run(check: Callable[[], Awaitable[CheckResult]], clock: Clock) -> CheckResult:
    """Return the result of checks, retrying them if they could not complete."""

    async def sleep(seconds: float) -> None:
        await clock.wait(anyio.Event(), clock.monotonic() + seconds)

    return await AsyncRetrying(
        retry=retry_if_result(lambda result: isinstance(result, ChecksNotRun)),
        wait=wait_exponential(),
        stop=stop_after_attempt(_MAX_TRIES),
        sleep=sleep,
        retry_error_callback=lambda state: None if state.outcome is None else state.outcome.result(),
    )(check)


async def _is_working(ledger: Ledger, holder: LockHolder | None) -> bool:
    """Return True if the holder of a lock is an active orchestrator of this run."""
    orchestrators = ledger.orchestrators
    records = [
        record
        for record in (await orchestrators.peers.all()).values()
        if holder is not None and record.owner.pid == holder.pid
    ]
    return any([await orchestrators.peers.assess(record) is OwnerStatus.ALIVE for record in records])
