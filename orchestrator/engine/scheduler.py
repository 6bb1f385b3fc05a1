"""The run's loop: look at the board, decide, perform, and feed what came of it back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import anyio
from anyio.abc import TaskGroup

from orchestrator.clock import Clock
from orchestrator.config.model import TaskSpec
from orchestrator.domain.dispatch import Board, decide
from orchestrator.domain.lifecycle import Trigger
from orchestrator.domain.model import Attempt, TaskStatus
from orchestrator.domain.outcome import Built, Failed, Interrupted, Unchanged
from orchestrator.domain.retry import retry_delay
from orchestrator.engine.ledger import Ledger
from orchestrator.engine.merging import MergeQueue
from orchestrator.errors import GitError
from orchestrator.failpoints import failpoint
from orchestrator.protocols import Adapter, JsonObject
from orchestrator.repo import worktrees
from orchestrator.repo.git import Git
from orchestrator.repo.hub import Hub, internal_ref
from orchestrator.repo.landing import Target
from orchestrator.repo.source import Source
from orchestrator.repo.worktrees import Worktree
from orchestrator.sessions.session import Finished, Session

#: Seconds after which a landing that could not be made is tried again while sessions are at work.
DEFERRED_PAUSE = 30.0
#: How often, and after how many seconds each, it is tried again when nothing else is left to do: the user may just
#: be in the middle of a commit.
LAST_TRIES, LAST_PAUSE = 3, 1.0


@dataclass(frozen=True, slots=True)
class Workshop:
    """The places and tools that a run works with."""

    hub: Hub
    git: Git
    source: Source
    target: Target
    adapters: Mapping[str, Adapter]
    logs: Path
    environ: Mapping[str, str]


async def remove_worktree(ledger: Ledger, shop: Workshop, worktree: Worktree) -> None:
    """Remove a worktree whose work is saved; one that can't be is named, and left."""
    try:
        await worktrees.remove(shop.git, worktree)
    except GitError as error:
        details = {"task": worktree.task, "worktree": str(worktree.root), "reason": error.stderr}
        await ledger.note("task.worktree_kept", details)


class Scheduler:
    """Runs what the board allows, within capacity, until nothing is left that could be done."""

    def __init__(self, ledger: Ledger, workshop: Workshop, board: Board, clock: Clock) -> None:
        """Take a run whose cut-off attempts have been returned; `board` reflects its documents."""
        self._ledger, self._shop, self._board, self._clock = ledger, workshop, board, clock
        self._merging = MergeQueue(ledger, workshop.target, workshop.git, clock)
        self._sessions: dict[str, Session] = {}
        self._queue: deque[str] = deque()
        self._deferred: list[str] = []
        self._deferred_until = 0.0
        self._last_tries = LAST_TRIES
        self._landing = False
        self._stopping = False
        self._wake = anyio.Event()
        self._base: str | None = None

    def stop(self) -> None:
        """Start nothing more and stop the sessions that run; a landing under way is brought to its end."""
        self._stopping = True
        for session in self._sessions.values():
            session.stop()
        self._wake.set()

    async def run(self) -> bool:
        """Work until nothing is left that could be done; False if it was stopped before that."""
        statuses = self._ledger.statuses()
        for wanted in (TaskStatus.LANDING, TaskStatus.QUEUED):
            self._queue.extend(task for task, status in statuses.items() if status is wanted)
        async with anyio.create_task_group() as group:
            await self._tick(group)
            while not self._idle():
                await self._pause()
                self._wake = anyio.Event()
                await self._tick(group)
        if self._stopping and not self._board.is_over(self._ledger.statuses()):
            return False
        try:
            await self._merging.verify()
        except GitError as error:
            await self._ledger.note("run.target_unreachable", {"reason": str(error)})
        return True

    async def _tick(self, group: TaskGroup) -> None:
        if self._stopping:
            return
        now = self._clock.monotonic()
        if self._deferred and now >= self._deferred_until:
            if not self._sessions:
                self._last_tries -= 1
            self._queue.extendleft(reversed(self._deferred))
            self._deferred.clear()
        if self._queue and not self._landing:
            self._landing = True
            group.start_soon(self._land, self._queue.popleft())
        starts = decide(self._board, self._free(), now)
        bases: dict[bool, str] = {}
        for start in starts:
            spec = await self._ledger.spec(start.task)
            builds_on_target = bool(spec.needs)
            if builds_on_target not in bases:
                bases[builds_on_target] = await self._start_point(builds_on_target)
            if self._stopping:  # while we asked where to start from
                return
            session = self._sessions[start.task] = self._session(start.task, spec, bases[builds_on_target])
            group.start_soon(self._attempt, start.task, spec, session)

    def _free(self) -> int:
        """How many sessions may start. None while more is built than can be landed: it would only grow stale."""
        capacity = self._ledger.run.capacity
        return capacity - len(self._sessions) if len(self._queue) < capacity else 0

    def _idle(self) -> bool:
        if self._sessions or self._landing:
            return False
        waits_to_land = self._queue or (self._deferred and self._last_tries > 0)
        return self._stopping or not (waits_to_land or self._board.has_work())

    async def _pause(self) -> None:
        times = [self._board.next_time() if self._free() else None]
        times.append(self._deferred_until if self._deferred else None)
        await self._clock.wait(self._wake, min((time for time in times if time is not None), default=None))

    async def _start_point(self, builds_on_target: bool) -> str:
        """Return the commit that new work starts from: the base as it is now, or the target if it needs others."""
        try:
            if builds_on_target:
                return await self._shop.target.tip()
            tip = await self._shop.source.tip(self._ledger.run.base)
            if tip is not None and tip != self._base:
                ref = internal_ref(self._ledger.run.id, "base")
                self._base = await self._shop.source.fetch(self._ledger.run.base, ref)
        except GitError:
            # A remote that can't be reached for a moment: what was seen last will do.
            if builds_on_target and self._shop.target.known is not None:
                return self._shop.target.known
            if builds_on_target or self._base is None:
                raise
        return self._base or self._ledger.run.start

    def _session(self, task: str, spec: TaskSpec, base: str) -> Session:
        number = len(self._ledger.task(task).attempts) + 1
        return Session(
            git=self._shop.git,
            worktree=Worktree(self._shop.hub, self._ledger.run.id, task, number),
            base=base,
            prompt=spec.prompt,
            adapter=self._shop.adapters[spec.adapter],
            timeout=spec.timeout,
            logs=self._shop.logs,
            environ=self._shop.environ,
        )

    async def _attempt(self, task: str, spec: TaskSpec, session: Session) -> None:
        attempt = Attempt(number=session.worktree.attempt, base=session.base, started=self._clock.now())
        attempts = (*self._ledger.task(task).attempts, attempt)
        details = {"base": session.base, "adapter": spec.adapter}
        await self._ledger.change(task, Trigger.START, details, attempts=attempts)
        failpoint("attempt.recorded")
        finished = await session.run()
        retry_in = await self._record(task, spec, finished)
        if finished.collected:
            await remove_worktree(self._ledger, self._shop, session.worktree)
        else:
            details = {"task": task, "worktree": str(session.worktree.tree), "reason": "it holds what is on no branch"}
            await self._ledger.note("task.worktree_kept", details)
        # The board hears of it last: from then on the task may have its next session.
        del self._sessions[task]
        self._feed(task, retry_in)
        self._wake.set()

    def _feed(self, task: str, retry_in: float | None) -> None:
        match self._ledger.task(task).status:
            case TaskStatus.QUEUED:
                self._queue.append(task)
            case TaskStatus.NO_CHANGE | TaskStatus.FAILED:
                self._board.ended(task)
            case TaskStatus.PENDING if retry_in is not None:
                self._board.wait(task, self._clock.monotonic() + retry_in)

    async def _record(self, task: str, spec: TaskSpec, finished: Finished) -> float | None:
        """Record how an attempt ended; return the seconds after which another may follow, None if none may now."""
        outcome = finished.outcome
        match outcome:
            case Built(commit):
                await self._end(task, Trigger.BUILD, finished, "built", None, commit=commit)
                failpoint("work.recorded")
            case Unchanged():
                await self._end(task, Trigger.IDLE, finished, "no_change", "the program ended well but changed nothing")
            case Interrupted(reason):
                await self._end(task, Trigger.INTERRUPT, finished, "interrupted", reason)
            case Failed(failure, reason, final):
                failures = self._ledger.task(task).failures + 1
                if final or failures >= spec.attempts:
                    await self._end(task, Trigger.FAIL, finished, failure, reason, failures=failures)
                    return None
                delay = round(retry_delay(spec.backoff.policy(), failures), 3)
                await self._end(
                    task, Trigger.RETRY, finished, failure, reason, details={"retry_in": delay}, failures=failures
                )
                return delay
            case _:
                assert_never(outcome)
        return None

    async def _end(
        self,
        task: str,
        trigger: Trigger,
        finished: Finished,
        outcome: str,
        reason: str | None,
        details: JsonObject | None = None,
        **changes: Any,
    ) -> None:
        attempts = self._ledger.task(task).with_attempt(
            ended=self._clock.now(), branch=finished.branch, outcome=outcome, reason=reason
        )
        facts = {"outcome": outcome, "reason": reason, "branch": finished.branch, **(details or {})}
        await self._ledger.change(
            task, trigger, facts, attempts=attempts, branch=finished.branch, reason=reason, **changes
        )

    async def _land(self, task: str) -> None:
        status = await self._merging.land(task)
        if status is TaskStatus.LANDED:
            self._board.landed(task)
        elif status is TaskStatus.CONFLICT:
            self._board.ended(task)
        else:
            pause = DEFERRED_PAUSE if self._sessions else LAST_PAUSE
            if not self._deferred or not self._sessions:
                self._deferred_until = self._clock.monotonic() + pause
            self._deferred.append(task)
        self._landing = False
        self._wake.set()
