"""Run the checks on the base before sessions start.

A check that fails there would fail every task.
"""

from __future__ import annotations

import shlex
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import anyio
import anyio.to_thread

from orchestrator.domain.events.runs import BaseChecking, BasePassed
from orchestrator.domain.runs.halts import HaltReason
from orchestrator.domain.runs.model import RunDocument
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.settings.run_settings import Check, TaskSpec
from orchestrator.engine.checks.base_commands import BaseCommands
from orchestrator.engine.checks.check_runs import CheckRequest
from orchestrator.engine.phases.base_selection import BaseSelector
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.reload import can_reload
from orchestrator.errors import GitError
from orchestrator.repo.landing.merge_commits import renew_retry_base
from orchestrator.sessions.setup.checks import ChecksNotRun, ChecksPassed
from orchestrator.sessions.setup.shell import CommandFailed, describe_unrunnable
from orchestrator.sessions.setup.worktree_setup import SETUP_REMEDY
from orchestrator.system.failpoints import failpoint

#: The maximum number of rounds if the base keeps moving, so that it can't prevent the start of a run.
_MAX_ROUNDS = 3
#: The maximum length of a suggested command with the names of its tasks: it fits in a line of 80 columns.
_MAX_COMMAND_LENGTH = 78
#: The maximum numbers of checks with missing programs to report at once, and of groups of tasks to search for them.
_MAX_UNRUNNABLE, _MAX_SEARCHED_GROUPS = 5, 20

#: Tasks by `allow_failing_base`, by whether their landing includes the base, and by checks.
_CheckGroups = dict[tuple[bool, bool, tuple[Check, ...]], list[str]]


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
    """The checks of a run's base; `entries` are the run's tasks, `blocked` those that can no longer start."""

    ledger: Ledger
    context: RunContext
    commands: BaseCommands
    base_selector: BaseSelector
    entries: Mapping[str, DispatchEntry]
    blocked: Container[str]
    _running: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)

    def stop(self) -> None:
        """Stop running checks; `failure` then returns None."""
        self._running.cancel()

    async def failure(self) -> str | None:
        """Return the reason to start no session, or None.

        The reason is a check of a pending task that fails on the base. Passed checks are recorded and not repeated.
        Only one process per machine runs the checks at a time. If the base moves in the meantime, it is checked again.
        """
        groups = await self._group_pending_tasks()
        if not groups:
            return None
        failure: str | None = None
        with self._running:
            async with self.commands.lock():
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
        """Return the reason why checks, or those of `later` groups of tasks, can't run."""
        for tasks, base in later:
            spec = await self.ledger.definitions.spec(tasks[0])
            known = {failed.command for one in found for failed in one.failed}
            if len(known) >= _MAX_UNRUNNABLE:
                break
            if not await self.commands.runs.has_passed(await self._request(tasks[0], spec, base)):
                is_allowed = spec.allow_failing_base or self.ledger.run.allow_failing_base
                failed = await self.commands.find_unrunnable(
                    tasks[0], spec, spec.check_commands, base.commit, may_be_added=is_allowed
                )
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
        """Group the pending tasks that can start and share checks.

        Keys consist of `allow_failing_base`, whether the landing includes the base, and the checks.
        """
        groups: _CheckGroups = {}
        known: dict[str, bool] = {}
        for task, status in self.ledger.statuses().items():
            entry = None if task in self.blocked else self.entries.get(task)
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

    async def _find_failure(self, tasks: Sequence[str], base: CheckedBase) -> str | _Unrunnable | None:
        """Return the reason for failed shared checks of these tasks on a commit, or None."""
        task, spec, commit = tasks[0], await self.ledger.definitions.spec(tasks[0]), base.commit
        request = await self._request(task, spec, base)
        if await self.commands.runs.has_passed(request):
            return None
        if spec.allow_failing_base or self.ledger.run.allow_failing_base:
            unrunnable = await self.commands.find_unrunnable(task, spec, spec.check_commands, commit, may_be_added=True)
            return _Unrunnable(unrunnable, tasks, base) if unrunnable else None
        await self.ledger.note(BaseChecking(commit=commit, branch=base.branch, checks=spec.check_commands))
        result = await self.commands.run(request)
        failpoint("base.checked")
        match result:
            case ChecksPassed():
                await self.ledger.note(BasePassed(commit=commit, branch=base.branch, checks=spec.check_commands))
                return None
            case ChecksNotRun(reason):
                headline = f"checks could not run on {base.branch} ({commit[:10]}): {reason}"
                return str(HaltReason(headline, remedy=(f"fix that, then `council resume {self.ledger.run.id}`",)))
            case CommandFailed() if result.unrunnable is not None and result.command in spec.check_commands:
                later = spec.check_commands[spec.check_commands.index(result.command) + 1 :]
                unrunnable = [
                    result,
                    *await self.commands.find_unrunnable(task, spec, later, commit, may_be_added=False),
                ]
                return _Unrunnable(unrunnable, tasks, base)
            case CommandFailed():
                specs = [await self.ledger.definitions.spec(name) for name in tasks]
                correction = describe_check_fix(self.ledger.run, specs)
                return _describe_failure(result, spec, base, self.ledger.run, correction)
            case _:
                assert_never(result)

    async def _request(self, task: str, spec: TaskSpec, base: CheckedBase) -> CheckRequest:
        return await self.commands.request(task, spec, spec.checks, base.commit)


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
    is_check = failed.command in spec.check_commands
    correction = correction if is_check else SETUP_REMEDY
    if failed.unrunnable is not None:
        return describe_unrunnable([failed], correction, run.id, base.merge)
    kind, allowed = ("check", " or pass --allow-failing-base:") if is_check else ("setup", ", then")
    headline = f"{kind} `{failed.short}` fails on {base.branch} ({base.commit[:10]}): {failed.how_it_ended}"
    remedy = f"fix {run.base}{base.merge}{allowed} `council resume {run.id}`", f"or {correction}"
    return str(HaltReason(headline, tuple(failed.output_tail.splitlines()), str(failed.log), remedy))
