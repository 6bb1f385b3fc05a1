"""Check the merges of waiting tasks before it is their turn, on the assumption that all before them land.

The window follows Zuul's gate pipelines: it grows with each success, and is halved by a failure
(https://zuul-ci.org/docs/zuul/latest/gating.html).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress

import anyio
from anyio.abc import TaskGroup

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.landing_order import QueueWindow, WindowEntry
from orchestrator.engine.checks.check_runs import CheckRequest
from orchestrator.engine.landing.batches import Batches
from orchestrator.engine.landing.merge_checks import CheckedMerges, MergeChecks, first_parent
from orchestrator.engine.phases.conflict_resolution import may_merge_structurally
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import queue_key
from orchestrator.errors import CouncilError, GitError, RefusedError
from orchestrator.locking.merge_lease import HeldMergeLease
from orchestrator.protocols import Commit, Write
from orchestrator.repo.landing.target_branch import Target

#: The tasks of a merge, its commit, and the request for its checks; None if there are none.
_CheckedMerge = tuple[Sequence[str], str, CheckRequest | None]


class LookAhead:
    """Checks merges and, meanwhile, those that are next in the queue."""

    def __init__(self, ledger: Ledger, target: Target, checks: MergeChecks, batches: Batches) -> None:
        self._ledger, self._target, self._checks, self._batches = ledger, target, checks, batches
        # A pull request does not land on another one.
        window = 1 if ledger.run.pull_requests is not None else ledger.run.merge.window
        self._first_window = min(window, ledger.run.capacity)
        self._window = self._first_window
        self._changed = anyio.Event()
        self._merged: dict[tuple[str, str], PreparedMerge | None] = {}
        """Merges by the commit below and the work; None if it can't be merged."""
        self._requests: dict[tuple[str, str], CheckRequest | None] = {}
        """The checks of merges by the commit that their batch is made onto, and by their own.

        None if there are none, or if they can't be requested now.
        """
        self._recorded = QueueWindow()
        checks.runs.when_ended = self.update

    def update(self) -> None:
        """Consider tasks that were added to the queue."""
        self._changed.set()
        self._changed = anyio.Event()

    async def check(
        self,
        lease: HeldMergeLease,
        merges: Mapping[str, PreparedMerge],
        waiting: Callable[[], Sequence[str]],
        group: TaskGroup,
    ) -> CheckedMerges:
        """Check consecutive merges, see `MergeChecks.check`.

        Meanwhile, `group` checks the merges of the `waiting` tasks and of those that are added.
        """
        task, merge = list(merges.items())[-1]
        whole = await self._checks.request(task, merge, first_parent(next(iter(merges.values()))))
        if whole is None:
            return CheckedMerges(len(merges))
        if not whole.key.checks:
            return CheckedMerges(len(merges), records=self._checks.runs.describe_skipped(whole))
        checked, failure, ahead = CheckedMerges(0), None, anyio.CancelScope()

        def stop() -> None:
            ahead.cancel()
            self._checks.runs.prefetch(group, [])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._check_waiting, ahead, lease, merges, whole, waiting, group)
            try:
                checked = await self._checks.check(merges, whole, stop)
            except CouncilError as error:  # the task group would raise it as a group
                failure = error
            ahead.cancel()
        if failure is not None:
            raise failure
        self._resize(has_passed=checked.passed == len(merges))
        return checked

    def _resize(self, *, has_passed: bool) -> None:
        """Adjust the window to the result of a merge; one that begins with one merge never grows."""
        if self._first_window > 1:
            self._window = min(self._window + 1, self._ledger.run.capacity) if has_passed else max(self._window // 2, 1)

    async def _check_waiting(
        self,
        scope: anyio.CancelScope,
        lease: HeldMergeLease,
        merges: Mapping[str, PreparedMerge],
        whole: CheckRequest,
        waiting: Callable[[], Sequence[str]],
        group: TaskGroup,
    ) -> None:
        """Check the batches after `merges`, which are being checked, until `scope` is cancelled."""
        self._merged.clear()
        self._requests.clear()
        with scope:
            while True:
                changed = self._changed
                last = list(merges.values())[-1]
                ahead = list[_CheckedMerge]()
                async with aclosing(self._batches.divide(waiting())) as batches:
                    async for batch in batches:
                        if len(_requests(ahead)) >= self._window - 1:
                            break
                        since = last.new
                        last, merged = await self._merge(lease, last, batch)
                        request = await self._request(merged[-1], last, since) if merged else None
                        ahead.append((merged, last.new, request))
                self._checks.runs.prefetch(group, _requests(ahead), current=whole)
                current = list(merges), list(merges.values())[-1].new, whole
                await self._record(next(iter(merges.values())).old or whole.base, [current, *ahead])
                await changed.wait()

    async def _record(self, onto: str, merges: Sequence[_CheckedMerge]) -> None:
        """Record consecutive merges, from `onto`, for other processes."""
        writer, runs = self._ledger.writer, self._checks.runs
        since = {entry.commit: entry.since for entry in self._recorded.entries}
        entries, ahead = list[WindowEntry](), tuple[str, ...]()
        for tasks, commit, request in merges:
            if request is not None:
                began, state = since.get(commit, writer.clock.now()), runs.state(request.key)
                entry = WindowEntry(tasks=tuple(tasks), commit=commit, onto=onto, ahead=ahead, since=began, state=state)
                entries.append(entry)
            onto, ahead = commit, (*ahead, *tasks)
        window = QueueWindow(entries=tuple(entries))
        if window == self._recorded:
            return
        key = queue_key(self._ledger.run.id, writer.orchestrators.me.id)
        with suppress(CouncilError):  # commits of landings report an outage
            stored = await writer.store.get(key)
            version = 0 if stored is None else stored.version
            await writer.commit(Commit([Write(key, version, window.model_dump(mode="json"))], durable=False))
            self._recorded = window

    async def _merge(
        self, lease: HeldMergeLease, last: PreparedMerge, batch: Sequence[str]
    ) -> tuple[PreparedMerge, list[str]]:
        """Merge tasks, each onto the previous one; return the last merge, and the tasks that could be merged."""
        merged = []
        for task in batch:
            document = self._ledger.task(task)
            if document.status is not TaskStatus.QUEUED or document.commit is None:
                continue
            key = last.new, document.commit
            if key not in self._merged:
                label, base = f"{self._ledger.run.id}/{task}", document.built_base
                resolve = may_merge_structurally(document, await self._ledger.definitions.spec(task))
                try:
                    result = await self._target.prepare(lease, label, document.commit, base, last, resolve=resolve)
                except (GitError, RefusedError):  # reported when it is this task's turn
                    continue
                self._merged[key] = result if isinstance(result, PreparedMerge) else None
            if (merge := self._merged[key]) is not None:
                last = merge
                merged.append(task)
        return last, merged

    async def _request(self, task: str, merge: PreparedMerge, since: str) -> CheckRequest | None:
        key = since, merge.new
        if key not in self._requests:
            try:
                request = await self._checks.request(task, merge, since)
            except (GitError, RefusedError):  # reported when it is this task's turn
                request = None
            self._requests[key] = request if request is not None and request.key.checks else None
        return self._requests[key]


def _requests(merges: Sequence[_CheckedMerge]) -> list[CheckRequest]:
    return [request for _, _, request in merges if request is not None]
