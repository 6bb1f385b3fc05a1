"""Runs the checks on the base before the first session: a check that fails there would fail every task."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import anyio

from orchestrator.config.model import TaskSpec
from orchestrator.domain.commands import lookup_of, programs_in
from orchestrator.domain.dispatch import Entry
from orchestrator.domain.model import TaskStatus
from orchestrator.engine.ledger import Ledger
from orchestrator.engine.starting_points import StartingPoints
from orchestrator.engine.workshop import Workshop
from orchestrator.errors import GitError
from orchestrator.failpoints import failpoint
from orchestrator.repo.pool import Pool
from orchestrator.sessions.checks import CheckResult, Passed, Unchecked
from orchestrator.sessions.equipment import NEW_SETUP
from orchestrator.sessions.shell import CommandFailed

#: The number of the attempt that the checks of a base are named after; those of tasks begin at 1.
_BEFORE_ATTEMPTS = 0
#: Lines of the output of a failed check or setup that the end of a run shows; its log has all.
_SHOWN = 15
#: Tasks that a command of a remedy names; more are left to the reader.
_MOST_NAMED = 5


@dataclass(slots=True)
class BaseChecks:
    """The checks of a run's base; `entries` are its tasks."""

    ledger: Ledger
    shop: Workshop
    pool: Pool
    starts: StartingPoints
    entries: Mapping[str, Entry]
    _running: anyio.CancelScope = field(default_factory=anyio.CancelScope, init=False)
    _unrunnable: dict[tuple[str, tuple[str, ...]], str | None] = field(default_factory=dict, init=False)
    """By base and commands, why one of them can't be run there."""

    def stop(self) -> None:
        """End the checks that run; `failure` then returns None."""
        self._running.cancel()

    async def failure(self) -> str | None:
        """Return why no session should start: a check of a pending task fails on the base; None if none does.

        What passes is recorded, and is not run again by any process of the run. One process of a machine runs them
        at a time.
        """
        sets = self._sets()
        if not sets:
            return None
        found = None
        with self._running:
            commits = await self._bases()
            async with self.shop.hub.lock(f"base-{self.ledger.run.id}").hold():
                for commit, branch in commits.items():
                    for tasks in sets:
                        found = found or await self._failure_of(tasks, commit, branch)
        return found

    def _sets(self) -> list[list[str]]:
        """Return the pending tasks by their checks, those first whose checks must pass on the base."""
        sets: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
        for task, status in self.ledger.statuses().items():
            entry = self.entries.get(task)
            if entry is not None and status is TaskStatus.PENDING and entry.checks:
                may_fail = entry.allow_failing_base or self.ledger.run.allow_failing_base
                sets.setdefault((may_fail, entry.checks), []).append(task)
        return [sets[key] for key in sorted(sets, key=lambda key: key[0])]

    async def _bases(self) -> dict[str, str]:
        """Return the commits on which landings build, with their branches: target and base, or the one with both."""
        run = self.ledger.run
        try:
            target, base = [await self.starts.newest(builds_on_target=on_target) for on_target in (True, False)]
            if target == base or await self.shop.git.is_ancestor(target, base):
                return {base: run.base}
            both = {target: run.target, base: run.base}
            return {target: run.target} if await self.shop.git.is_ancestor(base, target) else both
        except GitError:  # the start of the first session reports that
            return {}

    async def _failure_of(self, tasks: Sequence[str], commit: str, branch: str) -> str | None:
        """Return why the checks that these tasks share fail on a commit."""
        task, spec = tasks[0], await self.ledger.spec(tasks[0])
        key = await self._key(spec, commit)
        if self._has_landed(spec, commit) or key in await self.ledger.proven_bases():
            return None
        correction = corrected_check(self.ledger.run.id, tasks)
        if spec.allow_failing_base or self.ledger.run.allow_failing_base:
            return await self._unrunnable_on(task, spec, commit, correction)
        facts = {"commit": commit, "branch": branch, "checks": list(spec.checks)}
        await self.ledger.note("base.checking", facts)
        result = await self._run(task, spec, spec.checks, commit)
        failpoint("base.checked")
        match result:
            case Passed():
                await self.ledger.prove_base(key, facts)
                return None
            case Unchecked(reason):
                await self.ledger.note("base.unchecked", {**facts, "reason": reason})
                return None
            case CommandFailed():
                return _described(result, spec, f"{branch} ({commit[:10]})", self.ledger.run.id, correction)
            case _:
                assert_never(result)

    async def _unrunnable_on(self, task: str, spec: TaskSpec, commit: str, correction: str) -> str | None:
        """Return why a check that may fail on the base can't be run there; None if all can.

        Only a check that names a program that is not found is run: others may take long.
        """
        for command in spec.checks:
            names = [name for name in programs_in(command) if "/" not in name]
            question = " && ".join(lookup_of(name) for name in names)
            result = await self._run(task, spec, (question,), commit) if names else Passed()
            if isinstance(result, CommandFailed) and result.command == question:
                result = await self._run(task, spec, (command,), commit)
                found = result.unrunnable if isinstance(result, CommandFailed) else None
                if isinstance(result, CommandFailed) and found is not None and "/" not in found.program:
                    return result.describe_unrunnable(correction)
        return None

    async def _run(self, task: str, spec: TaskSpec, commands: tuple[str, ...], commit: str) -> CheckResult:
        checks = self.shop.checks(self.pool, self.ledger.run.id, task, _BEFORE_ATTEMPTS, spec, commands)
        return await checks.run(commit, commit)

    async def _key(self, spec: TaskSpec, commit: str) -> str:
        """Return what identifies a base with its checks and the setup that they need."""
        tree = await self.shop.git.line("rev-parse", f"{commit}^{{tree}}")
        setup = await self.shop.tools.equipment.keys(commit) if self.shop.worktrees.setup else ()
        facts = json.dumps([tree, spec.checks, spec.checks_env, setup])
        return hashlib.sha256(facts.encode()).hexdigest()[:32]

    def _has_landed(self, spec: TaskSpec, commit: str) -> bool:
        """Return whether a commit is a merge of this run that has passed the same checks."""
        return any(
            one.landed == commit and commit in one.intended and self.entries[task].checks == spec.checks
            for task, one in self.ledger.documents().items()
            if task in self.entries
        )

    async def why_unrunnable(
        self, task: str, spec: TaskSpec, commands: tuple[str, ...], failed: CommandFailed, base: str, correction: str
    ) -> str | None:
        """Return why a check that ended with 126 or 127 can't be run whatever the task changed.

        `correction` is how a mistake in the command is fixed.

        None where the task may be at fault: its base has the program.
        """
        found = failed.unrunnable
        if found is None:
            return None
        is_allowed = spec.allow_failing_base or self.ledger.run.allow_failing_base
        if is_allowed and "/" in found.program:  # a file that the task may be there to create
            return None
        commands = (failed.command,) if is_allowed else commands
        key = (base, (*commands, failed.command))
        if key not in self._unrunnable:
            async with self.shop.hub.lock(f"base-{self.ledger.run.id}").hold():
                result = await self._run(task, spec, commands, base)
            is_missing_there = isinstance(result, CommandFailed) and result.unrunnable is not None
            self._unrunnable[key] = failed.describe_unrunnable(correction) if is_missing_there else None
        return self._unrunnable[key]


def corrected_check(run: str, tasks: Sequence[str], *, is_built: bool = False) -> str:
    """Return how a mistake in a check that tasks share is fixed; `is_built` tasks wait to land."""
    names = " ".join(map(shlex.quote, tasks)) if len(tasks) <= _MOST_NAMED else "TASK..."
    cancel = f"`council cancel {names} --run {run}`, " if is_built else ""
    return f"correct the check in the file, then {cancel}`council retry {names} --reload --run {run}`, and resume"


def _described(failed: CommandFailed, spec: TaskSpec, where: str, run: str, correction: str) -> str:
    is_check = failed.command in spec.checks
    correction = correction if is_check else NEW_SETUP
    if failed.unrunnable is not None:
        return failed.describe_unrunnable(correction)
    kind = "check" if is_check else "setup"
    fix = "fix the base, or add --allow-failing-base:" if is_check else "fix the base, then"
    return (
        f"{kind} `{failed.short}` fails on {where}, before any session: it {failed.ended}\n"
        + "".join(f"{line}\n" for line in failed.last_words.splitlines()[-_SHOWN:])
        + f"log: {failed.log}\n"
        + f"{fix} `council resume {run}`\n"
        + f"or {correction}"
    )
