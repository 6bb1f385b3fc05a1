"""The transcripts and changes of a run's sessions, as shown in its live table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from orchestrator.api.topics.activity import ActivityObserver, ObservedSession
from orchestrator.domain.runs.model import Attempt, TaskDocument
from orchestrator.domain.runs.statuses import FINAL_STATUSES, USER_STATUSES, TaskStatus
from orchestrator.repo.git.change_counts import Changes
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, Transcript

#: Statuses after a session, in which a row shows the line counts of the work that the session left.
_SESSION_ENDED = (FINAL_STATUSES - {TaskStatus.LANDED}) | {TaskStatus.QUEUED} | USER_STATUSES


class SessionActivity(ActivityObserver):
    """Selects the sessions and commits to observe, and keeps the latest observations."""

    def __init__(self, tasks: Mapping[str, TaskDocument], running: Iterable[str]) -> None:
        """Observe tasks and the `running` ones among them, which the caller keeps current."""
        self._tasks, self._running = tasks, running
        self.transcripts: dict[str, Transcript] = {}
        self.total_changes = Changes()
        self._changes: dict[str, Changes] = {}
        self._uncounted: dict[str, str] = {}
        """Commits of landed tasks whose changes were not counted yet, keyed by task."""
        self._unseen: dict[str, None] = {}
        """Tasks whose session has ended, and whose final changes were not observed yet."""

    def changes(self, task: str) -> Changes:
        """Return the changes of a task."""
        return self._changes.get(task, Changes())

    def last_message(self, task: str) -> str:
        """Return the last message of a task's session; empty if there is none."""
        return self.transcripts.get(task, EMPTY_TRANSCRIPT).last_message or ""

    def reset(self, task: str) -> None:
        """Drop the observations of a task's previous attempt."""
        self.transcripts.pop(task, None)
        self._replace(task, Changes())

    def update(self, task: str, before: TaskDocument | None, after: TaskDocument) -> None:
        """Select the observations of a task whose document changed."""
        if before is not None and before.status is TaskStatus.RUNNING and after.status in _SESSION_ENDED:
            if after.status is TaskStatus.QUEUED or after.attempt.branch is not None:
                self._unseen[task] = None
            else:
                self._replace(task, Changes())  # no work of the session is preserved
        elif after.status in {TaskStatus.PENDING, TaskStatus.LANDED}:
            self._unseen.pop(task, None)
        if after.landed is not None and (before is None or before.landed != after.landed):
            self._uncounted[task] = after.landed

    def working(self) -> list[ObservedSession]:
        """See `ActivityObserver`."""
        return [_session(task, self._tasks[task].attempt) for task in self._running]

    def built(self) -> list[ObservedSession]:
        """See `ActivityObserver`."""
        return [_session(task, self._tasks[task].building_attempt) for task in self._unseen]

    def uncounted_commits(self, most: int) -> dict[str, str]:
        """See `ActivityObserver`."""
        return dict(islice(self._uncounted.items(), most))

    def on_transcript(self, session: ObservedSession, transcript: Transcript) -> None:
        """See `ActivityObserver`."""
        if self._is_current(session):
            self.transcripts[session.task] = transcript

    def on_changes(self, session: ObservedSession, changes: Changes) -> None:
        """See `ActivityObserver`."""
        if self._is_current(session):
            self._unseen.pop(session.task, None)
            self._replace(session.task, changes)

    def count(self, task: str, changes: Changes) -> None:
        """See `ActivityObserver`."""
        self._uncounted.pop(task, None)
        self._replace(task, changes)

    def _is_current(self, session: ObservedSession) -> bool:
        document = self._tasks[session.task]
        numbers = {one.number for one in (document.attempt, document.building_attempt)} if document.attempts else set()
        return document.landed is None and session.attempt in numbers

    def _replace(self, task: str, changes: Changes) -> None:
        self.total_changes = self.total_changes - self.changes(task) + changes
        self._changes[task] = changes


def _session(task: str, attempt: Attempt) -> ObservedSession:
    return ObservedSession(task, attempt.number, attempt.adapter)
