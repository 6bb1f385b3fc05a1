"""Run the checks on the base before sessions start.

A check that fails there would fail every task.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import assert_never

import anyio
import anyio.to_thread
from tenacity import AsyncRetrying, retry_if_result, stop_after_attempt, wait_exponential

from orchestrator.domain.events.runs import BaseChecking, BasePassed
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.claims import OwnerStatus
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.sessions.shell_commands import (
    find_programs,
    is_in_worktree,
    is_of_environment,
    make_lookup_command,
    may_create,
)
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.landing.base_selection import BaseSelector
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.reload import can_reload
from orchestrator.errors import GitError, LockHeld
from orchestrator.repo.landing.merge_commits import renew_retry_base
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.sessions.setup.checks import CheckResult, ChecksNotRun, ChecksPassed
from orchestrator.sessions.setup.shell import CommandFailed, UnrunnableProgram, describe_unrunnable
from orchestrator.sessions.setup.worktree_setup import SETUP_REMEDY
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint
from orchestrator.system.file_lock import LockHolder

#: Attempt number for the checks of a base; attempts of tasks start at 1.
_BASE_CHECK_ATTEMPT = 0
#: The maximum number of rounds if the base keeps moving, so that it can't prevent the start of a run.
_MAX_ROUNDS = 3
#: The maximum number of attempts at checks that could not complete; pauses between them double from one second.
_MAX_TRIES = 4
#: Seconds between polls for the process that checks the base.
_POLL_INTERVAL = 1.0
#: The maximum length of a suggested command with the names of its tasks: it fits in a line of 80 columns.
_MAX_COMMAND_LENGTH = 78
#: The maximum numbers of checks with missing programs to report at once, and of groups of tasks to search for them.
_MAX_UNRUNNABLE, _MAX_SEARCHED_GROUPS = 5, 20

#: Tasks by `allow_failing_base`, by whether their landing includes the base, and by checks.
_CheckGroups = dict[tuple[bool, bool, tuple[str, ...]], list[str]]


@dataclass(frozen=True, slots=True)
class CheckedBase:
    """A commit that the landings of tasks build on."""

    commit: str
    branch: str
    """Its branch; both branches if the commit merges the base into the target."""
    merge: str = ""
    """How a fix of the base reaches the target; empty if landings include the base."""


@dataclass(frozen=True, slots=True)
class _Unrunnable:
    """Checks of tasks that cannot run on a base."""

    failed: Sequence[CommandFailed]
    tasks: Sequence[str]
    base: CheckedBase


@dataclass(slots=True)
class BaseChecks:
    """The checks of a run's base; `entries` are the run's tasks."""

    ledger: Ledger
    context: RunContext
    pool: SlotPool
    base_selector: BaseSelector
    entries: Mapping[str, DispatchEntry]
    _running: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)
    _unrunnable: dict[tuple[str, tuple[str, ...]], str | None] = field(default_factory=dict, init=False)
    """The reason that one of the commands can't run on a base, by base and commands."""

    def stop(self) -> None:
        """Stop running checks; `failure` then returns None."""
        self._running.cancel()

    async def failure(self) -> str | None:
        """Return the reason to start no session, or None.

        The reason is a check of a pending task that fails on the base. Passed checks are recorded, and no process of
        the run repeats them. Only one process per machine runs the checks at a time. If the base moves in the meantime,
        it is checked again.
        """
        groups = await self._group_pending_tasks()
        if not groups:
            return None
        failure: str | None = None
        with self._running:
            async with _hold_base_lock(self.ledger, self.context):
                checked: list[str] = []
                for _ in range(_MAX_ROUNDS):
                    tips = await self._tips(groups)
                    if tips == checked:
                        break
                    failure, checked = await self._first_failure(groups), tips
        return None if self._running.cancelled_caught else failure

    async def _first_failure(self, groups: _CheckGroups) -> str | None:
        """Return the reason for a failed check, required checks first; None if all pass.

        If a check can't be run, those of other tasks that can't be run are included.
        """
        bases: dict[bool, CheckedBase | None] = {}
        checked = []
        for (_, brings_base, _), tasks in sorted(groups.items(), key=lambda group: group[0][0]):
            if brings_base not in bases:
                bases[brings_base] = await self._base(brings_base=brings_base)
            if (base := bases[brings_base]) is not None:
                checked.append((tasks, base))
        for number, (tasks, base) in enumerate(checked):
            failure = await self._find_failure(tasks, base)
            if isinstance(failure, _Unrunnable):
                later = checked[number + 1 : number + 1 + _MAX_SEARCHED_GROUPS]
                return await self._describe_unrunnable([failure], later)
            if failure is not None:
                return failure
        return None

    async def _describe_unrunnable(
        self, found: list[_Unrunnable], later: Sequence[tuple[Sequence[str], CheckedBase]]
    ) -> str:
        """Return the reason why checks can't be run, including those of `later` groups of tasks."""
        for tasks, base in later:
            spec = await self.ledger.definitions.spec(tasks[0])
            known = {failed.command for one in found for failed in one.failed}
            if len(known) >= _MAX_UNRUNNABLE:
                break
            if not await self._is_proven(spec, base.commit):
                is_allowed = spec.allow_failing_base or self.ledger.run.allow_failing_base
                failed = await self._unrunnable_on(tasks[0], spec, spec.checks, base.commit, may_be_added=is_allowed)
                found += [_Unrunnable(failed, tasks, base)] if failed else []
        by_command = {failed.command: failed for one in found for failed in one.failed}
        specs = [await self.ledger.definitions.spec(task) for one in found for task in one.tasks]
        correction = describe_check_fix(self.ledger.run, specs)
        merge = next((one.base.merge for one in found if one.base.merge), "")
        return describe_unrunnable([*by_command.values()], correction, self.ledger.run.id, merge)

    async def _tips(self, groups: _CheckGroups) -> list[str]:
        """Return the newest commits that landings build on; empty if unknown."""
        kinds = (True, False) if any(brings_base for _, brings_base, _ in groups) else (True,)
        try:
            return [await self.base_selector.newest(builds_on_target=kind) for kind in kinds]
        except GitError:  # reported when the first session starts
            return []

    async def _group_pending_tasks(self) -> _CheckGroups:
        """Group the pending tasks that share checks.

        Keys consist of `allow_failing_base`, whether the landing includes the base, and the checks.
        """
        groups: _CheckGroups = {}
        known: dict[str, bool] = {}
        for task, status in self.ledger.statuses().items():
            entry = self.entries.get(task)
            if entry is not None and status is TaskStatus.PENDING and entry.checks:
                may_fail = entry.allow_failing_base or self.ledger.run.allow_failing_base
                key = may_fail, await self._brings_base(task, known), entry.checks
                groups.setdefault(key, []).append(task)
        return groups

    async def _brings_base(self, task: str, known: dict[str, bool]) -> bool:
        """Return True if the landing of a pending task includes the base.

        This is the case if the task, or a pending task that it needs, starts from the base.
        """
        if task not in known:
            known[task] = not self.base_selector.builds_on_target(task, await self.ledger.definitions.spec(task))
            statuses = self.ledger.statuses()
            for need in self.entries[task].needs:
                if need in self.entries and statuses.get(need) is TaskStatus.PENDING:
                    known[task] = await self._brings_base(need, known) or known[task]
        return known[task]

    async def _base(self, *, brings_base: bool) -> CheckedBase | None:
        """Return the commit that landings build on; None if unknown.

        It is the target, merged with the base if landings include the base.
        """
        run, git = self.ledger.run, self.context.git
        try:
            target = await self.base_selector.newest(builds_on_target=True)
            if not brings_base:
                return CheckedBase(target, run.target, await self._merge_into_target())
            base = await self.base_selector.newest(builds_on_target=False)
            if await git.is_ancestor(target, base):
                return CheckedBase(base, run.base)
            if await git.is_ancestor(base, target):
                return CheckedBase(target, run.target)
            merged = await renew_retry_base(git, base, target, self.context.refs("checked-base"))
        except GitError:  # reported when the first session starts
            return None
        # If the two conflict, only work that starts from the base can be checked.
        if isinstance(merged, str):
            return CheckedBase(merged, f"{run.target} with {run.base}")
        return CheckedBase(base, run.base)

    async def _merge_into_target(self) -> str:
        """Return the steps by which a fix of the base reaches the target."""
        run = self.ledger.run
        if run.target == run.base:
            return ""
        target, base = shlex.quote(run.target), shlex.quote(run.base)
        command = f"git switch {target} && git merge --no-edit {base} && git switch -"
        if await self.context.source.tip(run.target) is None:
            command = f"git branch {target} {base}"
        return f" and merge that into {run.target} (`{command}`)"

    async def _is_proven(self, spec: TaskSpec, commit: str) -> bool:
        """Return True if the checks of a task have passed on a commit."""
        key = await _hash_checks(self.context, spec, commit)
        return self._has_landed(spec, commit) or key in await self.ledger.run_state.proven_bases()

    async def _find_failure(self, tasks: Sequence[str], base: CheckedBase) -> str | _Unrunnable | None:
        """Return the reason for failed shared checks of these tasks on a commit, or None."""
        task, spec, commit = tasks[0], await self.ledger.definitions.spec(tasks[0]), base.commit
        if await self._is_proven(spec, commit):
            return None
        if spec.allow_failing_base or self.ledger.run.allow_failing_base:
            unrunnable = await self._unrunnable_on(task, spec, spec.checks, commit, may_be_added=True)
            return _Unrunnable(unrunnable, tasks, base) if unrunnable else None
        await self.ledger.note(BaseChecking(commit=commit, branch=base.branch, checks=spec.checks))
        result = await self._run(task, spec, spec.checks, commit)
        failpoint("base.checked")
        match result:
            case ChecksPassed():
                passed = BasePassed(commit=commit, branch=base.branch, checks=spec.checks)
                await self.ledger.run_state.record_passed_base(await _hash_checks(self.context, spec, commit), passed)
                return None
            case ChecksNotRun(reason):
                headline = f"checks could not run on {base.branch} ({commit[:10]}): {reason}"
                return str(HaltReason(headline, remedy=(f"fix that, then `council resume {self.ledger.run.id}`",)))
            case CommandFailed() if result.unrunnable is not None and result.command in spec.checks:
                later = spec.checks[spec.checks.index(result.command) + 1 :]
                unrunnable = [result, *await self._unrunnable_on(task, spec, later, commit, may_be_added=False)]
                return _Unrunnable(unrunnable, tasks, base)
            case CommandFailed():
                specs = [await self.ledger.definitions.spec(name) for name in tasks]
                correction = describe_check_fix(self.ledger.run, specs)
                return _describe_failure(result, spec, base, self.ledger.run, correction)
            case _:
                assert_never(result)

    async def _unrunnable_on(
        self, task: str, spec: TaskSpec, commands: Sequence[str], commit: str, *, may_be_added: bool
    ) -> list[CommandFailed]:
        """Return the commands that cannot run on a commit.

        Commands whose program a task may add (`may_be_added`) are omitted. Only checks with a missing program are run,
        because other checks may take long.
        """
        failures = []
        for command in commands:
            probe = " && ".join(
                self._probe_command(command, program, may_be_added=may_be_added) for program in find_programs(command)
            )
            result = await self._run(task, spec, (probe,), commit) if probe else ChecksPassed()
            if isinstance(result, CommandFailed) and result.command == probe:
                result = await self._run(task, spec, (command,), commit)
                if isinstance(result, CommandFailed) and (missing := result.unrunnable) is not None:
                    failures += [] if may_be_added and self._may_add(command, missing) else [result]
        return failures

    async def _run(self, task: str, spec: TaskSpec, commands: tuple[str, ...], commit: str) -> CheckResult:
        """Run commands on a commit; retry a few times if they could not complete."""
        # A separate folder per process avoids conflicts with leftovers of a killed or suspended process.
        by = self.ledger.orchestrators.me.id.rpartition("-")[2]
        check_args = (self.pool, self.ledger.run.id, task, _BASE_CHECK_ATTEMPT, spec, commands, by)

        async def check() -> CheckResult:
            return await self.context.checks(*check_args).run(commit, commit)

        return await _repeat_unless_run(check, self.context.tools.clock)

    def _has_landed(self, spec: TaskSpec, commit: str) -> bool:
        """Return True if a commit is a merge of this run that passed the same checks."""
        return any(
            document.landed == commit
            and commit in document.intended_merges
            and self.entries[task].checks == spec.checks
            for task, document in self.ledger.tasks.documents().items()
            if task in self.entries
        )

    async def explain_unrunnable(
        self, task: str, spec: TaskSpec, commands: tuple[str, ...], failed: CommandFailed, base: str, correction: str
    ) -> str | None:
        """Return the reason that a check which exited with 126 or 127 can never run.

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
            async with _hold_base_lock(self.ledger, self.context):
                result = await self._run(task, spec, commands, base)
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


async def _hash_checks(context: RunContext, spec: TaskSpec, commit: str) -> str:
    """Return a hash of a base, its checks, and the setup that they need."""
    tree = await context.git.line("rev-parse", f"{commit}^{{tree}}")
    setup = await context.tools.worktree_setup.keys(commit) if context.worktrees.setup else ()
    facts = json.dumps([tree, spec.checks, spec.checks_env, setup])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


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


@asynccontextmanager
async def _hold_base_lock(ledger: Ledger, context: RunContext) -> AsyncIterator[None]:
    """Hold the lock under which only one process of this machine runs base checks.

    Continue without the lock if its holder is suspended or has left the run.
    """
    lock = context.hub.lock(f"base-{ledger.run.id}")
    async with AsyncExitStack() as stack:
        while True:
            try:
                await stack.enter_async_context(lock.hold(_POLL_INTERVAL))
                break
            except LockHeld:
                if not await _is_working(ledger, await anyio.to_thread.run_sync(LockHolder.read, lock.path)):
                    break
        yield


async def _is_working(ledger: Ledger, holder: LockHolder | None) -> bool:
    """Return True if the holder of a lock is an active orchestrator of this run."""
    orchestrators = ledger.orchestrators
    records = [
        record
        for record in (await orchestrators.peers.all()).values()
        if holder is not None and record.owner.pid == holder.pid
    ]
    return any([await orchestrators.peers.assess(record) is OwnerStatus.ALIVE for record in records])


def describe_check_fix(run: RunDocument, specs: Sequence[TaskSpec], *, is_built: bool = False) -> str:
    """Return the fix for an error in a shared check.

    `is_built` tasks are queued to land.
    """
    if not all(can_reload(run, spec) for spec in specs):
        return "correct the check and start a new run"
    names = " ".join(shlex.quote(spec.id) for spec in specs)
    if len(f"council retry {names} --reload --run {run.id}") > _MAX_COMMAND_LENGTH:
        names = "TASK..."
    cancel = f"`council cancel {names} --run {run.id}`, then " if is_built else ""
    retry = f"{cancel}`council retry {names} --reload --run {run.id}`"
    return f"correct the check in the file and, before you resume, run {retry}"


def _describe_failure(
    failed: CommandFailed, spec: TaskSpec, base: CheckedBase, run: RunDocument, correction: str
) -> str:
    is_check = failed.command in spec.checks
    correction = correction if is_check else SETUP_REMEDY
    if failed.unrunnable is not None:
        return describe_unrunnable([failed], correction, run.id, base.merge)
    kind, allowed = ("check", " or add --allow-failing-base") if is_check else ("setup", "")
    headline = f"{kind} `{failed.short}` fails on {base.branch} ({base.commit[:10]}): {failed.how_it_ended}"
    remedy = f"fix {run.base}{base.merge}{allowed}, then `council resume {run.id}`", f"or {correction}"
    return str(HaltReason(headline, tuple(failed.output_tail.splitlines()), str(failed.log), remedy))
