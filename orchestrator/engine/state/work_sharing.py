"""Share the built work of a run with its other machines, so that any of them can continue or land it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final, cast

import anyio
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_never, wait_exponential
from tenacity.stop import stop_base

from orchestrator.domain.events.tasks import TaskWorkNotShared
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.phases import PhaseRecord
from orchestrator.domain.runs.statuses import FINAL_STATUSES, SUCCESS_STATUSES, TaskStatus
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.engine.state.writer import RunWriter
from orchestrator.errors import GitError
from orchestrator.repo.source.shared_work import SharedWork, TaskCommit
from orchestrator.system.failpoints import failpoint

#: The number of attempts to push work before it is recorded, within about a minute.
_MAX_ATTEMPTS: Final = 8
#: The maximum pause in seconds between two attempts.
_MAX_PAUSE: Final = 15.0


class WorkSharing:
    """Pushes the commits that the records of tasks name before they are recorded, and fetches those of other machines.

    While the remote can't be reached, a change waits for about a minute. Then it is recorded, only this machine can
    continue its work for now, and `run` pushes it later.
    """

    def __init__(self, work: SharedWork, writer: RunWriter) -> None:
        self._work, self._writer = work, writer
        self._pushed = set[TaskCommit]()
        self._pending = set[TaskCommit]()
        self._added = anyio.Event()

    async def push(self, updates: Mapping[str, TaskUpdate]) -> None:
        """Push the commits that will be recorded by these changes."""
        new = {work for task, update in updates.items() for work in _named(task, update.changes)} - self._pushed
        if not new:
            return
        try:
            async for attempt in self._retrying(stop_after_attempt(_MAX_ATTEMPTS)):
                with attempt:
                    await self._push(new)
        except GitError as error:
            for task in sorted({work.task for work in new}):
                await self._writer.note_once(TaskWorkNotShared(task=task, reason=str(error)), task)
            self._pending |= new
            self._added.set()

    async def run(self, documents: Callable[[], Mapping[str, TaskDocument]]) -> None:
        """Push the work that is only on this machine, for example after an outage or a kill, until cancelled."""
        async for attempt in self._retrying(stop_never):
            with attempt:
                self._pushed |= await self._work.list()
        open_tasks = {task: one for task, one in documents().items() if one.status not in FINAL_STATUSES}
        named = {work for task, one in open_tasks.items() for work in _named(task, dict(one))}
        self._pending |= {work for work in named - self._pushed if await self._work.has(work.commit)}
        while True:
            async for attempt in self._retrying(stop_never):
                with attempt:
                    await self._push(self._pending)
            await self._added.wait()
            self._added = anyio.Event()

    async def fetch(self, work: TaskCommit, ref: str) -> None:
        """Fetch recorded work, and store it as `ref`, unless it is here; see `SharedWork.fetch`."""
        await self._work.fetch(work, ref)

    async def remove(self, statuses: Mapping[str, TaskStatus]) -> None:
        """Remove the work of successful tasks from the remote, if it can be reached."""
        with suppress(GitError):
            await self._work.delete(lambda task: statuses.get(task) in SUCCESS_STATUSES)

    async def _push(self, works: Collection[TaskCommit]) -> None:
        works = set(works)
        if works:
            await self._work.push(works)
            failpoint("shared_work.pushed")
        self._pushed |= works
        self._pending -= works
        for task in {work.task for work in works}:
            self._writer.forget(TaskWorkNotShared, task)

    def _retrying(self, stop: stop_base) -> AsyncRetrying:
        clock = self._writer.clock

        async def sleep(seconds: float) -> None:
            await clock.wait(anyio.Event(), clock.monotonic() + seconds)

        return AsyncRetrying(
            retry=retry_if_exception_type(GitError),
            wait=wait_exponential(max=_MAX_PAUSE),
            stop=stop,
            sleep=sleep,
            reraise=True,
        )


def _named(task: str, fields: Mapping[str, object]) -> Iterator[TaskCommit]:
    """Yield the commits of a task that fields of its record name."""
    phases = cast("Sequence[PhaseRecord]", fields.get("phases", ()))
    for commit in (*map(fields.get, ("commit", "start", "conflict")), *(phase.commit for phase in phases)):
        if isinstance(commit, str):
            yield TaskCommit(task, commit)
