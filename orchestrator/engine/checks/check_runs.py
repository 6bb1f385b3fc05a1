"""Run checks once for each tree: results are cached, and equal checks in progress are joined.

A passed check is recorded in the store, so that no task, run or machine repeats it, and leased while it runs. The key
covers the tree, the command, the values of its variables, the setup, the sandbox, and the user's files in the worktree.
Failures are kept in memory only, because their cause may be outside of the key: a missing program, for example.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from orchestrator.domain.events.tasks import TaskCheckFlaky
from orchestrator.domain.runs.check_results import (
    MAX_CHECK_AGE,
    CheckKey,
    CheckOutcome,
    CheckRecord,
    CheckSource,
    digest_facts,
)
from orchestrator.domain.scheduling.landing_order import CheckState
from orchestrator.domain.settings.run_settings import Check, TaskSpec
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import check_key, read_check
from orchestrator.errors import VersionConflict
from orchestrator.locking.check_leases import CheckLeases
from orchestrator.protocols import Commit, Write
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.sessions.setup.checks import CHECKS_STOPPED, CheckResult, ChecksPassed, EndedCheck
from orchestrator.sessions.setup.environment import build_base_environment
from orchestrator.sessions.setup.shell import CommandFailed, shorten_command
from orchestrator.system.failpoints import failpoint

#: The environment of a check, without variables of its worktree.
_NO_TREE = Path("/")


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """Checks of the tree of `commit`, whose parent on the target is `base`, for an attempt of a task."""

    task: str
    attempt: int
    spec: TaskSpec
    key: CheckKey
    commit: str
    base: str
    checker: str = ""
    """Names the worktree and logs if other checks of the attempt may run concurrently."""
    skipped: tuple[Check, ...] = ()
    """The checks that the changes do not select, because of their `paths`."""


class CheckedTree(NamedTuple):
    """The result of the checks of a tree, and the commands that ended, in order."""

    result: CheckResult
    records: tuple[CheckRecord, ...] = ()


_STOPPED = CheckedTree(CHECKS_STOPPED)


@dataclass(slots=True)
class _Running:
    """Checks in progress, started for a task."""

    task: str
    checked: CheckedTree = _STOPPED
    stopped_for: Container[str] = ()
    """The tasks that no longer need a result."""
    waiters: int = 0
    """How many callers need the result."""
    ended: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class CheckRuns:
    """The checks of one run in this process."""

    def __init__(self, ledger: Ledger, context: RunContext, pool: SlotPool) -> None:
        self._ledger, self._context, self._pool = ledger, context, pool
        self._leases = CheckLeases(ledger.writer.store, ledger.writer.clock, ledger.orchestrators)
        self._running: dict[CheckKey, _Running] = {}
        self._known: dict[CheckKey, CheckedTree] = {}
        """Results of checks that ran ahead of their turn: a success counts once, also if it is not recorded."""
        self._worktrees: defaultdict[tuple[str, int, str], anyio.Lock] = defaultdict(anyio.Lock)
        """Held by checks until they have left their worktree, also after they were stopped."""
        self._closed = False
        self.when_ended: Callable[[], None] = lambda: None
        """Called after checks have ended."""

    async def request(
        self,
        task: str,
        attempt: int,
        spec: TaskSpec,
        checks: Sequence[Check],
        commit: str,
        base: str,
        checker: str = "",
    ) -> CheckRequest:
        """Return a request, with the current key of its result. For the arguments, see `CheckRequest`."""
        context = self._context
        tree = await context.git.line("rev-parse", f"{commit}^{{tree}}")
        setup = await context.tools.worktree_setup.keys(commit) if context.worktrees.setup else ()
        variables = build_base_environment(spec.checks_env, context.tools.environ, _NO_TREE, {})
        files = await anyio.to_thread.run_sync(_describe_files, context.tools.worktree_setup.provisions.sources())
        facts = [variables, setup, files, self._ledger.run.sandbox.model_dump(mode="json"), spec.checks_timeout]
        key = CheckKey(tree, tuple(checks), digest_facts(*facts))
        return CheckRequest(task, attempt, spec, key, commit, base, checker)

    def state(self, key: CheckKey) -> CheckState:
        """Return the state of checks whose result is awaited, or was found ahead of its turn."""
        if (checked := self._known.get(key)) is None:
            return "running"
        return "failed" if _has_failed(checked) else "passed"

    def stop(self, tasks: Container[str]) -> None:
        """Stop the checks for these tasks; `run` then returns ChecksNotRun for them, and restarts those of others."""
        for running in self._running.values():
            if running.task in tasks:
                running.stopped_for = tasks
                running.scope.cancel()

    def close(self) -> None:
        """Stop all checks, and start no others."""
        self._closed = True
        self.stop([running.task for running in self._running.values()])

    async def run(self, request: CheckRequest, *, confirm: bool = False) -> CheckedTree:
        """Return the result of checks, from the cache if possible.

        With `confirm`, a failure is repeated once on the same tree before it is believed.
        """
        key = request.key
        if not key.checks:
            return CheckedTree(ChecksPassed())
        checked = self._known.get(key) or await self._join(request)
        if not _has_failed(checked):
            self._known.pop(key, None)
            return checked
        if not confirm:
            self._known[key] = checked
            return checked
        again = await self._join(request, earlier=checked)
        # Believed failures are not kept: their cause may be outside of the tree, and a user may correct it.
        self._known.pop(key, None)
        return checked if isinstance(again.result, CommandFailed) else again

    async def has_passed(self, request: CheckRequest) -> bool:
        """Return True if all checks are recorded as passed on the tree."""
        recorded = await self._read_recorded(request.key)
        return all(check.run in recorded for check in request.key.checks)

    def prefetch(
        self, group: TaskGroup, requests: Sequence[CheckRequest], *, current: CheckRequest | None = None
    ) -> None:
        """Start checks whose results will be needed if all earlier merges land; stop all others that nobody awaits.

        Checks of the `current` merge continue, but are not started: a failure that was believed is not repeated.
        """
        keys = [request.key for request in requests]
        keys += [] if current is None else [current.key]
        for key, running in self._running.items():
            if key not in keys and not running.waiters:
                running.scope.cancel()
        for request in requests:
            if request.key not in self._running and request.key not in self._known:
                group.start_soon(self._prefetch, request)

    async def _prefetch(self, request: CheckRequest) -> None:
        key = request.key
        if key in self._running or self._closed:
            return
        running = self._running[key] = _Running(request.task)
        checked = await self._run(running, request)
        if isinstance(checked.result, ChecksPassed) or _has_failed(checked):
            self._known[key] = checked

    async def _join(self, request: CheckRequest, earlier: CheckedTree = _STOPPED) -> CheckedTree:
        while not self._closed:
            running = self._running.get(request.key)
            if running is None:
                for other in self._running.values():  # of an earlier merge of the task, checked ahead of its turn
                    if other.task == request.task and not other.waiters:
                        other.scope.cancel()
                running = self._running[request.key] = _Running(request.task, waiters=1)
                return await self._run(running, request, earlier)
            is_joined = not running.scope.cancel_called
            running.waiters += is_joined
            try:
                await running.ended.wait()
            finally:
                running.waiters -= is_joined
            if is_joined and (running.checked is not _STOPPED or request.task in running.stopped_for):
                return running.checked
        return _STOPPED

    async def _run(self, running: _Running, request: CheckRequest, earlier: CheckedTree = _STOPPED) -> CheckedTree:
        # The repetition has its own log: both results are evidence.
        checker = request.key.tree[-6:] if _has_failed(earlier) else request.checker
        try:
            with running.scope:
                running.checked = await self._run_leased(request, checker, earlier)
        finally:
            del self._running[request.key]
            running.ended.set()
            self.when_ended()
        return running.checked

    async def _run_leased(self, request: CheckRequest, checker: str, earlier: CheckedTree) -> CheckedTree:
        """Run checks unless they are running elsewhere; wait for these, without a slot."""
        key = request.key
        while True:
            async with self._worktrees[request.task, request.attempt, checker], self._context.check_slots:
                recorded = await self._read_recorded(key, earlier)
                unrecorded = [check.run for check in key.checks if check.cache and check.run not in recorded]
                async with self._leases.hold([*map(key.record_id, dict.fromkeys(unrecorded))]) as running:
                    if not running:
                        # Another process may have recorded a result before the leases were held.
                        recorded = await self._read_recorded(key, earlier) if unrecorded else recorded
                        return await self._run_missing(request, checker, recorded, earlier)
            await self._leases.wait(running)

    async def _run_missing(
        self, request: CheckRequest, checker: str, recorded: Mapping[str, CheckRecord], earlier: CheckedTree
    ) -> CheckedTree:
        checks, before = request.key.checks, {record.command: record for record in earlier.records}
        records = dict(recorded)
        missing = [check for check in checks if check.run not in records]
        result: CheckResult = ChecksPassed()

        async def record(ended: EndedCheck) -> None:
            made = records[ended.command] = self._describe(request, ended, before.get(ended.command))
            if made.outcome is CheckOutcome.FLAKY:
                await self._note_flaky(made)
            if made.outcome is not CheckOutcome.FAILED and any(
                one.run == ended.command and one.cache for one in checks
            ):
                await self._record(request.key, made)
            failpoint("check.recorded")

        if missing:
            run = self._ledger.run.id
            runner = self._context.checks(
                self._pool, run, request.task, request.attempt, request.spec, missing, checker
            )
            result = await runner.run(request.commit, request.base, record)
        return CheckedTree(result, tuple(records[check.run] for check in checks if check.run in records))

    async def _read_recorded(self, key: CheckKey, earlier: CheckedTree = _STOPPED) -> dict[str, CheckRecord]:
        """Return the recorded successes by command, without commands that failed earlier.

        What passed just before a failure is not shown as a result of the cache.
        """
        store, found = self._ledger.writer.store, {}
        before = {record.command: record for record in earlier.records}
        for check in key.checks:
            ended = before.get(check.run)
            if check.cache and (ended is None or ended.outcome is not CheckOutcome.FAILED):
                _, record = await read_check(store, key.record_id(check.run))
                if record is not None:
                    found[check.run] = ended or record.model_copy(update={"source": CheckSource.CACHE})
        return found

    def _describe(self, request: CheckRequest, ended: EndedCheck, earlier: CheckRecord | None) -> CheckRecord:
        writer = self._ledger.writer
        outcome, failed_tests, failed_log = CheckOutcome.PASSED, tuple[str, ...](), None
        if ended.failure is not None:
            outcome, failed_tests = CheckOutcome.FAILED, tuple(ended.failure.failed_tests)
        elif earlier is not None and earlier.outcome is CheckOutcome.FAILED:
            outcome, failed_tests, failed_log = CheckOutcome.FLAKY, earlier.failed_tests, earlier.log
        return CheckRecord(
            command=ended.command,
            outcome=outcome,
            tree=request.key.tree,
            commit=request.commit,
            run=writer.run,
            task=request.task,
            ended=writer.clock.now(),
            seconds=round(ended.seconds, 3),
            host=socket.gethostname(),
            log=str(ended.log),
            failed_tests=failed_tests,
            failed_log=failed_log,
        )

    def describe_skipped(self, request: CheckRequest) -> tuple[CheckRecord, ...]:
        """Return the records of the checks that a request skips."""
        writer = self._ledger.writer
        return tuple(
            CheckRecord(
                command=check.run,
                outcome=CheckOutcome.SKIPPED,
                tree=request.key.tree,
                commit=request.commit,
                run=writer.run,
                task=request.task,
                ended=writer.clock.now(),
                seconds=0.0,
                host=socket.gethostname(),
                log="",
                paths=check.paths,
            )
            for check in request.skipped
        )

    async def _note_flaky(self, record: CheckRecord) -> None:
        event = TaskCheckFlaky(
            task=record.task,
            command=shorten_command(record.command),
            log=record.failed_log or "",
            passed_log=record.log,
        )
        await self._ledger.note(event)

    async def _record(self, key: CheckKey, record: CheckRecord) -> None:
        writer, digest = self._ledger.writer, key.record_id(record.command)
        version, _ = await read_check(writer.store, digest)
        write = Write(check_key(digest), version, writer.sanitize(record.model_dump(mode="json")), MAX_CHECK_AGE)
        with suppress(VersionConflict):  # another process recorded the same result
            await writer.store.commit(Commit([write, *await self._leases.release_writes([digest])], durable=False))


def _has_failed(checked: CheckedTree) -> bool:
    """Return True if a check failed for another reason than a missing program."""
    return isinstance(checked.result, CommandFailed) and checked.result.unrunnable is None


def _describe_files(paths: Iterable[Path]) -> str:
    """Return a digest of the names, sizes and times of the user's files that worktrees get. Blocks."""
    digest = hashlib.sha256()
    for path in paths:
        for folder, folders, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
            folders.sort()
            for name in sorted(names):
                with suppress(OSError):
                    found = Path(folder, name).stat()
                    digest.update(f"{folder}/{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()
