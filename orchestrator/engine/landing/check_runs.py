"""Run checks once for each tree: results are cached, and equal checks in progress are joined.

A passed check is recorded in the store, so that no task, run or machine repeats it. The key covers the tree, the
command, the values of its variables, the setup, the sandbox, and the user's files in the worktree. Failures are kept in
memory only, because their cause may be outside of the key: a missing program, for example.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from orchestrator.domain.events.tasks import TaskCheckFlaky
from orchestrator.domain.runs.check_results import CheckKey, CheckRecord, digest_facts
from orchestrator.domain.settings.run_settings import Check, TaskSpec
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import check_key, read_check
from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, Write
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.sessions.setup.checks import CHECKS_STOPPED, CheckResult, ChecksPassed, PassedCheck
from orchestrator.sessions.setup.environment import build_base_environment
from orchestrator.sessions.setup.shell import CommandFailed
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


@dataclass(slots=True)
class _Running:
    """Checks in progress, started for a task."""

    task: str
    result: CheckResult = CHECKS_STOPPED
    waiters: int = 0
    """How many callers need the result."""
    ended: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class CheckRuns:
    """The checks of one run in this process."""

    def __init__(self, ledger: Ledger, context: RunContext, pool: SlotPool, *, capacity: int) -> None:
        """Create the checks; up to `capacity` run at the same time."""
        self._ledger, self._context, self._pool = ledger, context, pool
        self._limiter = anyio.CapacityLimiter(capacity)
        self._running: dict[CheckKey, _Running] = {}
        self._failed: dict[CheckKey, CommandFailed] = {}
        self._worktrees: defaultdict[tuple[str, int, str], anyio.Lock] = defaultdict(anyio.Lock)
        """Held by checks until they have left their worktree, also after they were stopped."""
        self._passed: set[CheckKey] = set()
        """Checks that passed ahead of their turn: each counts once, also if it is not recorded."""
        self._closed = False

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
        """Return a request, with what identifies its result now. For the arguments, see `CheckRequest`."""
        context = self._context
        tree = await context.git.line("rev-parse", f"{commit}^{{tree}}")
        setup = await context.tools.worktree_setup.keys(commit) if context.worktrees.setup else ()
        variables = build_base_environment(spec.checks_env, context.tools.environ, _NO_TREE, {})
        files = await anyio.to_thread.run_sync(_describe_files, context.tools.worktree_setup.provisions.sources())
        facts = [variables, setup, files, self._ledger.run.sandbox.model_dump(mode="json"), spec.checks_timeout]
        key = CheckKey(tree, tuple(checks), digest_facts(*facts))
        return CheckRequest(task, attempt, spec, key, commit, base, checker)

    def stop(self, tasks: Container[str]) -> None:
        """Stop the checks for these tasks; `run` then returns ChecksNotRun."""
        for running in self._running.values():
            if running.task in tasks:
                running.scope.cancel()

    def close(self) -> None:
        """Stop all checks, and start no others."""
        self._closed = True
        self.stop([running.task for running in self._running.values()])

    async def run(self, request: CheckRequest, *, confirm: bool = False) -> CheckResult:
        """Return the result of checks, from the cache if possible.

        With `confirm`, a failure is repeated once on the same tree before it is believed.
        """
        key = request.key
        if key in self._passed:
            self._passed.remove(key)
            return ChecksPassed()
        result = self._failed.get(key) or await self._join(request)
        if not isinstance(result, CommandFailed) or result.unrunnable is not None:
            return result
        if not confirm:
            self._failed[key] = result
            return result
        again = await self._join(request, earlier=result)
        # Believed failures are not kept: their cause may be outside of the tree, and a user may correct it.
        self._failed.pop(key, None)
        return result if isinstance(again, CommandFailed) else again

    async def has_passed(self, request: CheckRequest) -> bool:
        """Return True if all checks are recorded as passed on the tree."""
        return not await self._missing(request.key)

    def prefetch(self, group: TaskGroup, requests: Sequence[CheckRequest]) -> None:
        """Start checks whose results will be needed if all earlier merges land; stop all others that nobody awaits."""
        keys = [request.key for request in requests]
        for key, running in self._running.items():
            if key not in keys and not running.waiters:
                running.scope.cancel()
        for request in requests:
            if not any(request.key in known for known in (self._running, self._failed, self._passed)):
                group.start_soon(self._prefetch, request)

    async def _prefetch(self, request: CheckRequest) -> None:
        key = request.key
        if key in self._running or self._closed:
            return
        running = self._running[key] = _Running(request.task)
        match await self._run(running, request):
            case ChecksPassed():
                self._passed.add(key)
            case CommandFailed(unrunnable=None) as failed:
                self._failed[key] = failed

    async def _join(self, request: CheckRequest, earlier: CommandFailed | None = None) -> CheckResult:
        key = request.key
        while (running := self._running.get(key)) is not None and running.scope.cancel_called:
            await running.ended.wait()
        if self._closed:
            return CHECKS_STOPPED
        if running is None:
            for other in self._running.values():  # of an earlier merge of the task, checked ahead of its turn
                if other.task == request.task and not other.waiters:
                    other.scope.cancel()
            running = self._running[key] = _Running(request.task, waiters=1)
            return await self._run(running, request, earlier)
        running.waiters += 1
        try:
            await running.ended.wait()
        finally:
            running.waiters -= 1
        return running.result

    async def _run(self, running: _Running, request: CheckRequest, earlier: CommandFailed | None = None) -> CheckResult:
        # The repetition has its own log: both results are evidence.
        checker = request.checker if earlier is None else request.key.tree[-6:]
        try:
            with running.scope:
                async with self._worktrees[request.task, request.attempt, checker], self._limiter:
                    running.result = await self._run_missing(request, checker, earlier)
        finally:
            del self._running[request.key]
            running.ended.set()
        return running.result

    async def _run_missing(self, request: CheckRequest, checker: str, earlier: CommandFailed | None) -> CheckResult:
        missing = await self._missing(request.key)
        if not missing:
            return ChecksPassed()
        run = self._ledger.run.id
        runner = self._context.checks(self._pool, run, request.task, request.attempt, request.spec, missing, checker)
        recorded = {check.run for check in request.key.checks if check.cache}

        async def record(passed: PassedCheck) -> None:
            failed = earlier if earlier is not None and earlier.command == passed.command else None
            if failed is not None:
                await self._ledger.note(TaskCheckFlaky(task=request.task, command=failed.short, log=str(failed.log)))
            if passed.command in recorded:
                await self._record(request, passed, is_flaky=failed is not None)
            failpoint("check.recorded")

        return await runner.run(request.commit, request.base, record)

    async def _missing(self, key: CheckKey) -> tuple[str, ...]:
        """Return the commands that are not known to pass."""
        now, store = self._ledger.writer.clock.now(), self._ledger.writer.store
        missing = []
        for check in key.checks:
            record = (await read_check(store, key.record_id(check.run)))[1] if check.cache else None
            if record is None or not record.is_valid(now):
                missing.append(check.run)
        return tuple(missing)

    async def _record(self, request: CheckRequest, passed: PassedCheck, *, is_flaky: bool) -> None:
        writer, key = self._ledger.writer, request.key
        record = CheckRecord(
            command=passed.command,
            tree=key.tree,
            run=writer.run,
            task=request.task,
            passed=writer.clock.now(),
            seconds=round(passed.seconds, 3),
            log=str(passed.log),
            host=socket.gethostname(),
            is_flaky=is_flaky,
        )
        digest = key.record_id(passed.command)
        version, _ = await read_check(writer.store, digest)
        value = writer.sanitize(record.model_dump(mode="json"))
        with suppress(VersionConflict):  # another process recorded the same result
            await writer.store.commit(Commit([Write(check_key(digest), version, value)], durable=False))


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
