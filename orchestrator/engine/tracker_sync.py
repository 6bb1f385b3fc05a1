"""Synchronize a run with its trackers: show the states of their tasks, and pass on what people request there.

Each synchronization compares whole states, so that a lost or repeated one does no harm. It neither delays nor fails the
run. A request is recorded together with the fact that it is handled: a person's request is performed once, even if a
process is killed at any point.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, wait_exponential
from tenacity.wait import wait_base

from orchestrator.domain.documents.stored import Cursor
from orchestrator.domain.events.base import RunEvent
from orchestrator.domain.events.runs import (
    ForgeChanged,
    TrackerConflict,
    TrackerFailing,
    TrackerOutdated,
    TrackerRecovered,
    TrackerRequested,
    TrackerRequestRefused,
)
from orchestrator.domain.events.tasks import TaskMessageSent
from orchestrator.domain.runs.model import RequestAction, RunRequest
from orchestrator.domain.runs.statuses import FINAL_STATUSES, SUCCESS_STATUSES, TaskStatus
from orchestrator.domain.scheduling.claims import Claim, OrchestratorLease
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.sessions.messages import MAX_MESSAGE_CHARS, MESSAGE_STATUSES, UserMessage
from orchestrator.engine.reports.report import RunRecord, RunReport
from orchestrator.engine.scheduler.requests import check_note, check_request, request_record
from orchestrator.engine.state.forge_changes import watch_events
from orchestrator.engine.state.records import cursor_key, message_write, spec_key
from orchestrator.errors import CouncilError, PluginFailed, RefusedError, VersionConflict
from orchestrator.protocols import Commit, Event, Key, Store, SyncResult, TrackedState, Tracker, TrackerRequest, Write
from orchestrator.system.background import ask_plugin, open_plugin, run_in_background
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

#: The time limits of one call, and of the last synchronization of a run, in seconds.
CALL_TIMEOUT: Final = 30.0
LAST_TIMEOUT: Final = 10.0
#: The minimum pause between two synchronizations, in seconds: changes in between are shown together.
MIN_PAUSE: Final = 2.0
_RETRY_WAIT: Final[wait_base] = wait_exponential(max=60.0)
_FINAL_RETRY_DELAY: Final = 0.5
_BLOCKED: Final = "blocked"
#: Why a task is cancelled that another run claims.
_LEFT: Final = "another run works on it"


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run at one point in time, as its trackers see it."""

    record: RunRecord
    report: RunReport
    claims: Mapping[str, Claim]

    def states(self, tracker: str) -> list[TrackedState]:
        """Return the states of the tasks of a tracker."""
        leases = {one.owner.id: one for one in self.record.orchestrators}
        return [
            self._state(task.to_json(), self.claims.get(task.id), leases)
            for task in self.report.tasks
            if self.record.entries[task.id].tracker == tracker
        ]

    def _state(
        self, task: dict[str, Any], claim: Claim | None, leases: Mapping[str, OrchestratorLease]
    ) -> TrackedState:
        is_blocked = task["status"] == _BLOCKED
        status = self.record.tasks[task["id"]].status
        owner = claim.owner if claim is not None and claim.released is None else None
        lease = None if owner is None else leases.get(owner.id)
        return TrackedState(
            run=self.record.run.id,
            task=task,
            label=_BLOCKED if is_blocked else status.record.label,
            has_ended=is_blocked or status in FINAL_STATUSES,
            is_done=status in SUCCESS_STATUSES,
            owner=None if owner is None else f"process {owner.pid} on {owner.host}",
            heartbeat=None if lease is None else lease.heartbeat,
            epoch=0 if claim is None else claim.epoch,
            retries=0 if claim is None else claim.retries,
            target=self.record.run.target,
            next_command=self._next_command(status),
        )

    def _next_command(self, status: TaskStatus) -> str | None:
        awaits_merge = status in SUCCESS_STATUSES and self.report.awaits_merge
        return f"council merge {self.record.run.id}" if awaits_merge else None


@dataclass(frozen=True, slots=True)
class TrackerLink:
    """A tracker of a run: its name, how often it is synchronized in seconds, and what opens it."""

    name: str
    interval: float
    open: Callable[[], AbstractAsyncContextManager[Tracker]]


@dataclass(frozen=True, slots=True)
class SyncReport:
    """The result of one synchronization with a tracker, for `council sync`."""

    tracker: str
    shown: int
    """The number of tasks whose states were compared."""
    requested: Sequence[str]
    """The requests that were passed on, as `<action> <task>`."""
    refused: Sequence[str]
    """The requests that the states of their tasks do not allow, with the reasons."""
    conflicts: Sequence[str]
    """The tasks that another run claims in the list."""


@dataclass(frozen=True, slots=True)
class TrackerStatus:
    """What is recorded about a tracker of a run, for `council sync --status`."""

    tracker: str
    tasks: int
    """The number of its tasks."""
    ended: int
    """How many of them have ended."""
    handled: int
    """The number of requests that were passed on or refused."""
    failing: str | None
    """The reason why the last synchronization failed; None: it did not."""


@dataclass(frozen=True, slots=True)
class _Changes:
    """What one synchronization records, and what it reports."""

    events: list[RunEvent]
    writes: list[Write] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


async def read_tracker_statuses(store: Store, found: TrackedRun) -> list[TrackerStatus]:
    """Return the statuses of all trackers of a run."""
    statuses = []
    for name in found.record.run.trackers:
        states = found.states(name)
        _, cursor = await _read_cursor(store, cursor_key(found.record.run.id, "tracker", name))
        ended = sum(state.has_ended for state in states)
        statuses.append(TrackerStatus(name, len(states), ended, len(cursor.handled), cursor.failing))
    return statuses


@asynccontextmanager
async def sync_trackers(
    store: Store,
    clock: Clock,
    redactor: Redactor,
    run: str,
    links: Sequence[TrackerLink],
    read: Callable[[], Awaitable[TrackedRun]],
) -> AsyncIterator[None]:
    """Synchronize with the trackers during the body and once afterwards.

    A tracker that does not show the end of the run is reported as `tracker.outdated`.
    """
    syncs = [TrackerSync(store, clock, redactor, run, link, read) for link in links]
    watchers = [one.watch_changes for one in syncs]
    async with run_in_background(*(one.repeat for one in syncs), *watchers, grace=LAST_TIMEOUT, grace_after_error=0):
        yield
        for one in syncs:
            one.end()
    for one in syncs:
        await one.close()


class TrackerSync:
    """Synchronizes one run with one tracker."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        redactor: Redactor,
        run: str,
        link: TrackerLink,
        read: Callable[[], Awaitable[TrackedRun]],
    ) -> None:
        self._store, self._clock, self._redactor = store, clock, redactor
        self._run, self._link, self._read = run, link, read
        self._key = cursor_key(run, "tracker", link.name)
        self._conflicts, self._abandoned = frozenset[str](), frozenset[str]()
        self._is_finished = False
        self._changed, self._ended = anyio.Event(), anyio.Event()
        self._watch_scope = anyio.CancelScope()

    async def repeat(self) -> None:
        """Synchronize until the end of the run; retry failures."""
        retrying = AsyncRetrying(
            retry=retry_if_result(lambda _: not self._is_finished), wait=self._choose_wait, sleep=self._pause
        )
        try:
            await retrying(self._try)
        except (CouncilError, OSError):  # the store is unavailable: the next process continues
            return

    async def watch_changes(self) -> None:
        """Synchronize soon after a task of the run changes."""
        with self._watch_scope:
            await watch_events(self._store, self._is_cause, lambda: self._changed.set())  # noqa: PLW0108  it is replaced

    def _is_cause(self, event: Event) -> bool:
        """Return True for an event after which to synchronize: a change of a task, or one that a forge reports."""
        if event.data.get("run") != self._run or event.type.startswith("tracker."):
            return False
        return "task" in event.data or event.type == ForgeChanged.type

    def end(self) -> None:
        """Stop after one more synchronization."""
        self._watch_scope.cancel()
        self._ended.set()
        self._changed.set()

    async def close(self) -> None:
        """Report a tracker that does not show the end of the run."""
        try:
            if not self._is_finished:
                await self._store.commit(Commit([], [Event.of(self._event(TrackerOutdated))]))
        except (CouncilError, OSError):
            return

    async def once(self) -> SyncReport:
        """Open the tracker, show the states of all tasks, and record the requests found.

        Raises PluginFailed, RefusedError or TimeoutError if the tracker fails, CouncilError if the store does.
        """
        async with open_plugin(self._link.open, CALL_TIMEOUT) as tracker:
            report = await self._sync(tracker)
        await self._record_recovery()
        return report

    async def _sync(self, tracker: Tracker) -> SyncReport:
        found = await self._read()
        states = found.states(self._link.name)
        result = SyncResult()
        if states:
            result = await ask_plugin(lambda: tracker.sync(states), CALL_TIMEOUT)
        requested, refused = await self._record(result, found)
        if result.problem is not None:
            raise result.problem
        return SyncReport(self._link.name, len(states), requested, refused, sorted(result.conflicts))

    async def _try(self) -> None:
        """Synchronize until the end or a failure, which is reported once."""
        try:
            await self._sync_until_end()
        except (PluginFailed, RefusedError) as failed:
            reason = str(failed)
        except TimeoutError:
            reason = f"timed out after {CALL_TIMEOUT:g} s"
        else:
            return
        if not await self._is_failing():
            reason = self._redactor.text(reason)
            await self._record_failure(reason, self._event(TrackerFailing, reason=reason))

    async def _sync_until_end(self) -> None:
        async with open_plugin(self._link.open, CALL_TIMEOUT) as tracker:
            while True:
                is_last = self._ended.is_set()
                await self._sync(tracker)
                await self._record_recovery()
                if is_last:
                    self._is_finished = True
                    return
                await self._wait()

    async def _wait(self) -> None:
        """Wait until the next synchronization is due."""
        await self._clock.wait(self._changed, self._clock.monotonic() + self._link.interval)
        await self._clock.wait(self._ended, self._clock.monotonic() + MIN_PAUSE)
        self._changed = self._ended if self._ended.is_set() else anyio.Event()

    async def _record(self, result: SyncResult, found: TrackedRun) -> tuple[list[str], list[str]]:
        """Record what is new in one commit; return the requests passed on, and those refused with reasons."""
        version, cursor = await _read_cursor(self._store, self._key)
        changes = _Changes([])
        conflicts, abandoned = frozenset(result.conflicts), frozenset(result.abandoned)
        self._leave(conflicts - self._conflicts, found.record, changes)
        self._take_over(abandoned - self._abandoned, found.record, changes)
        new = {one.id: one for one in result.requests if one.id not in cursor.handled}
        for request in new.values():
            if request.task in found.record.tasks and not await self._is_past(request):
                self._add_request(request, found.record, changes)
        texts = await self._add_texts(result.texts, cursor.texts, found.record, changes)
        if new or texts != cursor.texts:
            handled = [*cursor.handled, *new]
            changes.writes.append(self._write_cursor(version, cursor, handled=handled, texts=texts))
        if changes.writes or changes.events:
            try:
                await self._store.commit(Commit(changes.writes, [Event.of(one) for one in changes.events]))
            except VersionConflict:  # another process passes them on
                return [], []
            failpoint("request.recorded")
        self._conflicts, self._abandoned = conflicts, abandoned
        return changes.requested, changes.refused

    def _leave(self, tasks: Iterable[str], record: RunRecord, changes: _Changes) -> None:
        """Report tasks that another run claims, and cancel those that have not ended."""
        for task in sorted(tasks):
            changes.events.append(self._event(TrackerConflict, task=task))
            if task in record.tasks and record.tasks[task].status not in FINAL_STATUSES:
                self._add_request(TrackerRequest(self._new_id(task), task, "ignore", _LEFT), record, changes)

    def _take_over(self, tasks: Iterable[str], record: RunRecord, changes: _Changes) -> None:
        """Retry tasks that were left to a run that abandoned them."""
        for task in sorted(tasks):
            if task in record.tasks and record.tasks[task].ignored_reason == _LEFT:
                self._add_request(TrackerRequest(self._new_id(task), task, "retry"), record, changes)

    def _new_id(self, task: str) -> str:
        return f"claim-{task}-{int(self._clock.now() * 1000):x}"  # claims may change repeatedly

    async def _is_past(self, request: TrackerRequest) -> bool:
        """Return True if a request is older than its task: it was meant for an earlier run."""
        spec = await self._store.get(spec_key(self._run, request.task))
        return spec is not None and request.id in spec.value.get("past_requests", ())

    def _add_request(self, request: TrackerRequest, record: RunRecord, changes: _Changes) -> None:
        facts = {"task": request.task, "action": request.action, "request": request.id}
        try:
            made = self._to_request(request, record)
        except RefusedError as error:
            changes.events.append(
                self._event(TrackerRequestRefused, reason=self._redactor.text(error.message), **facts)
            )
            changes.refused.append(f"{request.action} {request.task}: {error.message}")
            return
        write, submitted = request_record(self._run, made)
        changes.writes.append(write)
        changes.events.extend([self._event(TrackerRequested, **facts), submitted])
        changes.requested.append(f"{request.action} {request.task}")

    async def _add_texts(
        self, texts: Mapping[str, str], known: Mapping[str, str], record: RunRecord, changes: _Changes
    ) -> Mapping[str, str]:
        """Send changed texts to the sessions of their tasks; return the digests of the texts that they know.

        A task that can't receive a message now receives it later: a task that has ended does so if it is retried.
        """
        digests = {task: hashlib.sha256(text.encode()).hexdigest()[:16] for task, text in texts.items()}
        after = dict(known)
        for task, digest in digests.items():
            if after.get(task) == digest or task not in record.tasks:
                continue
            status = record.tasks[task].status
            is_first = task not in after and await self._has_prompt(task, texts[task])
            if is_first:
                after[task] = digest
            elif status in MESSAGE_STATUSES:
                after[task] = digest
                self._add_message(task, texts[task], changes)
        return after

    async def _has_prompt(self, task: str, text: str) -> bool:
        """Return True if the prompt of a task begins with a text."""
        spec = await self._store.get(spec_key(self._run, task))
        return spec is not None and str(spec.value["prompt"]).startswith(text)

    def _add_message(self, task: str, text: str, changes: _Changes) -> None:
        now = self._clock.now()
        text = self._redactor.text(f"The text of the task was changed. It is now:\n\n{text}")[:MAX_MESSAGE_CHARS]
        message = UserMessage(id=f"{int(now * 1000):x}-text", text=text, time=now)
        changes.writes.append(message_write(self._run, task, message))
        changes.events.append(TaskMessageSent(run=self._run, task=task, message=message.id, text=text))
        changes.requested.append(f"edit {task}")

    def _to_request(self, request: TrackerRequest, record: RunRecord) -> RunRequest:
        """Return the request for the run's leader; raise RefusedError if the state of its task does not allow it."""
        action = RequestAction(request.action)
        check_note(request.note)
        if action is RequestAction.CANCEL and record.tasks[request.task].status in FINAL_STATUSES:
            raise RefusedError(f"task {request.task!r} has already ended", "there is nothing to cancel")
        check_request(action, (request.task,), record, is_live=True)
        return RunRequest(
            id=f"{self._link.name}-{request.id}",
            action=action,
            tasks=(request.task,),
            asked=self._clock.now(),
            reason=request.note,
        )

    def _event(self, event_type: Callable[..., RunEvent], **fields: Any) -> RunEvent:
        return event_type(run=self._run, tracker=self._link.name, **fields)

    def _write_cursor(self, version: int, cursor: Cursor, **changes: Any) -> Write:
        return Write(self._key, version, cursor.model_copy(update=changes).model_dump())

    async def _is_failing(self) -> bool:
        _, cursor = await _read_cursor(self._store, self._key)
        return cursor.failing is not None

    async def _record_recovery(self) -> None:
        if await self._is_failing():
            await self._record_failure(None, self._event(TrackerRecovered))

    async def _record_failure(self, reason: str | None, event: RunEvent) -> None:
        """Record why synchronization fails (None: it works again), with an event."""
        version, cursor = await _read_cursor(self._store, self._key)
        write = self._write_cursor(version, cursor, failing=reason)
        with suppress(VersionConflict):  # another process synchronizes too
            await self._store.commit(Commit([write], [Event.of(event)]))

    def _choose_wait(self, state: RetryCallState) -> float:
        return min(_RETRY_WAIT(state), _FINAL_RETRY_DELAY) if self._ended.is_set() else _RETRY_WAIT(state)

    async def _pause(self, delay: float) -> None:
        is_last = self._ended.is_set()
        await self._clock.wait(anyio.Event() if is_last else self._ended, self._clock.monotonic() + delay)


async def _read_cursor(store: Store, key: Key) -> tuple[int, Cursor]:
    found = await store.get(key)
    return (0, Cursor()) if found is None else (found.version, Cursor.model_validate(found.value))
