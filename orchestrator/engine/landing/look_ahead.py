"""Check the merges of waiting tasks before it is their turn, on the assumption that all before them land.

The window follows Zuul's gate pipelines: it grows with each success, and is halved by a failure
(https://zuul-ci.org/docs/zuul/latest/gating.html).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import anyio
from anyio.abc import TaskGroup

from orchestrator.domain.runs.model import PreparedMerge
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.landing.check_runs import CheckRequest
from orchestrator.engine.landing.merge_checks import MergeChecks
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError, RefusedError
from orchestrator.locking.merge_lease import HeldMergeLease
from orchestrator.repo.landing.target_branch import Target


class LookAhead:
    """Starts the checks of merges that are next in the queue."""

    def __init__(self, ledger: Ledger, target: Target, checks: MergeChecks) -> None:
        self._ledger, self._target, self._checks = ledger, target, checks
        self._first_window = min(ledger.run.merge.window, ledger.run.capacity)
        self._window = self._first_window
        self._changed = anyio.Event()
        self._merged: dict[tuple[str, str], PreparedMerge | None] = {}
        """Merges by the commit below and the work; None if it can't be merged."""

    def update(self) -> None:
        """Consider tasks that were added to the queue."""
        self._changed.set()
        self._changed = anyio.Event()

    def resize(self, *, has_passed: bool) -> None:
        """Adjust the window to the result of a merge; one that begins with one merge never grows."""
        if self._first_window == 1:
            return
        self._window = min(self._window + 1, self._ledger.run.capacity) if has_passed else max(self._window // 2, 1)

    async def run(
        self,
        lease: HeldMergeLease,
        merges: Mapping[str, PreparedMerge],
        batches: Callable[[], Awaitable[Sequence[Sequence[str]]]],
        group: TaskGroup,
    ) -> None:
        """Check the batches after `merges` in `group`, and those that are added, until cancelled."""
        task, merge = list(merges.items())[-1]
        first = await self._checks.request(task, merge)
        self._merged.clear()
        while first.checks:
            changed = self._changed
            requests = [first]
            last = merge
            for batch in await batches():
                if len(requests) >= self._window:
                    break
                last, request = await self._merge(lease, last, batch)
                if request is not None and request.checks:
                    requests.append(request)
            with suppress(GitError, RefusedError):  # reported when it is their turn
                await self._checks.runs.prefetch(group, requests)
            await changed.wait()

    async def _merge(
        self, lease: HeldMergeLease, last: PreparedMerge, batch: Sequence[str]
    ) -> tuple[PreparedMerge, CheckRequest | None]:
        """Merge tasks, each onto the previous one; return the last merge, and the request to check it, if any."""
        request = None
        for task in batch:
            document = self._ledger.task(task)
            if document.status is not TaskStatus.QUEUED or document.commit is None:
                continue
            key = last.new, document.commit
            if key not in self._merged:
                label, base = f"{self._ledger.run.id}/{task}", document.building_attempt.base
                try:
                    result = await self._target.prepare(lease, label, document.commit, base, last)
                except (GitError, RefusedError):  # reported when it is this task's turn
                    continue
                self._merged[key] = result if isinstance(result, PreparedMerge) else None
            if (merge := self._merged[key]) is not None:
                last, request = merge, await self._checks.request(task, merge)
        return last, request
