"""Predict merge conflicts between the running sessions of this process.

Every two seconds, sessions with new and overlapping changes are merged in memory. Each change of a prediction is
recorded once: as an event and a note of both tasks, in the records of both sessions, and for the next call of their
pre-edit hooks. With `hold` and `rebase`, the built work of their tasks is compared as well, until it has landed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Final

import anyio
import anyio.to_thread

from orchestrator.domain.events.coordination import ConflictPredicted, ConflictResolved
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.outcome import Paused
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.runs.statuses import LANDING_STATUSES, TaskStatus
from orchestrator.domain.scheduling.conflict_reactions import find_conflict_rebases
from orchestrator.domain.scheduling.path_ownership import escape_path
from orchestrator.domain.sessions.predicted_conflicts import MAX_PATHS, describe_conflict, describe_rebase
from orchestrator.domain.wording import join_names
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError, LeaseLost, RefusedError, StoreUnavailable
from orchestrator.repo.landing.live_conflicts import LiveConflicts, SessionPair
from orchestrator.repo.landing.trial_merges import TrialMerges
from orchestrator.sessions.session import Session

#: Seconds between two looks, and at most after repeated failures.
_INTERVAL: Final = 2.0
_MAX_PAUSE: Final = 60.0
_MIN_SESSIONS: Final = 2
_NOTE_TOPIC: Final = "conflict"


class ConflictPredictor:
    """Predicts conflicts between sessions; `sessions` returns the active ones."""

    def __init__(self, ledger: Ledger, context: RunContext, sessions: Callable[[], Iterable[Session]]) -> None:
        self._ledger, self._context, self._sessions = ledger, context, sessions
        self._conflicts: dict[SessionPair, frozenset[str]] = {}
        self._notes: dict[SessionPair, str] = {}
        """The note of the first session of each pair about the second."""
        self._records = ledger.run.merge.on_predicted_conflict in {"hold", "rebase"}

    async def run(self) -> None:
        """Predict conflicts until cancelled. After an error of git or of the store, start again from scratch."""
        context, pause = self._context, _INTERVAL
        while True:
            await self._wait(pause)
            if not self._is_comparable() and not self._conflicts:
                continue
            pause = min(2 * pause, _MAX_PAUSE)
            with suppress(GitError, OSError, RefusedError, StoreUnavailable):
                async with TrialMerges.open(context.git, context.hub, self._ledger.run.id) as trials:
                    live = LiveConflicts(context.git, trials, self._conflicts)
                    try:
                        while await self._look(live):
                            await self._wait(_INTERVAL)
                            pause = _INTERVAL
                    finally:
                        live.close()

    async def _wait(self, seconds: float) -> None:
        clock = self._context.tools.clock
        await clock.wait(anyio.Event(), clock.monotonic() + seconds)

    def _running(self) -> dict[SessionName, Session]:
        return {one.name: one for one in self._sessions() if one.is_writing}

    def _is_comparable(self) -> bool:
        running = self._running()
        return bool(running) and len(running) + len(self._built()) >= _MIN_SESSIONS

    def _built(self) -> dict[SessionName, TaskDocument]:
        """Return the sessions with recorded conflicts whose built work has not landed yet."""
        return {
            name: document
            for name, document in self._with_conflicts()
            if document.status in LANDING_STATUSES and document.commit is not None
        }

    def _ending(self, names: Iterable[SessionName]) -> set[SessionName]:
        """Return the sessions with recorded conflicts whose program has ended, and whose work is being built."""
        found = {name for name, document in self._with_conflicts() if document.status is TaskStatus.RUNNING}
        return found.intersection(names)

    def _with_conflicts(self) -> Iterator[tuple[SessionName, TaskDocument]]:
        run, tasks = self._ledger.run, self._ledger.tasks
        for task in {task for pair in run.predicted_conflicts for task in pair} if self._records else ():
            if task in tasks and tasks[task].attempts and not self._ledger.is_claimed_elsewhere(task):
                yield SessionName(run.id, task, tasks[task].building_attempt.number), tasks[task]

    async def _look(self, live: LiveConflicts) -> bool:
        """Report the changes of conflicts; return False if too few sessions are running."""
        running, built = self._running(), self._built()
        self._rebase(running)
        ended = {*live.sessions, *chain.from_iterable(self._conflicts)} - running.keys() - built.keys()
        ending = self._ending(ended.intersection(live.sessions))
        for name in ended - ending:
            await self._forget(live, name)
        for name in ending:
            live.freeze(name)
        if not self._is_comparable():
            return False
        for name, session in running.items():
            if name not in live.sessions and (work := session.live_work()) is not None:
                await live.follow(name, work.checkout, work.rules, work.assignment.base, work.assignment.start)
        for name, document in built.items():
            await live.follow_commit(name, document.built_base, document.commit or "")
        news = await live.look()
        if news and self._records:
            conflicts = {
                (min(one.task, other.task), max(one.task, other.task)): bool(paths)
                for (one, other), paths in news.items()
            }
            await self._ledger.run_state.record_predictions(conflicts)
        for (one, other), paths in news.items():
            await self._report(one, other, paths)
            await self._report(other, one, paths)
        return True

    def _rebase(self, running: Mapping[SessionName, Session]) -> None:
        """Stop the sessions that conflict with landed work; their tasks continue on top of it.

        The conflict is forgotten afterwards, so it stops no other session. A user who is attached decides when to end.
        """
        sessions = {name: session for name, session in running.items() if session.assignment.terminal is None}
        rebases = find_conflict_rebases(self._ledger.run, self._ledger.tasks.documents(), self._conflicts, sessions)
        for name, landed in rebases.items():
            reason = f"{join_names(landed)} landed, and a merge conflict with its work was predicted"
            sessions[name].stop(Paused(reason, describe_rebase(landed)))

    async def _forget(self, live: LiveConflicts, ended: SessionName) -> None:
        """Forget the conflicts of an ended session; their notes remain for later sessions."""
        others = {name for pair in self._conflicts if ended in pair for name in pair} - {ended}
        live.forget(ended)
        for other in others:
            self._notes.pop((ended, other), None)
            self._notes.pop((other, ended), None)
            await self._record(other, None)

    async def _report(self, me: SessionName, other: SessionName, paths: frozenset[str]) -> None:
        """Report to one session that its conflict with another has changed."""
        listed = sorted(paths)[:MAX_PATHS]
        resolved = ConflictResolved(task=me.task, attempt=me.attempt, other=other.task)
        await self._ledger.note(ConflictPredicted(**resolved.data(), paths=listed) if paths else resolved)
        message = describe_conflict(other.task, paths) if paths else None
        await self._record(me, message)
        await self._replace_note(me, other, message, listed)

    async def _record(self, me: SessionName, warning: str | None) -> None:
        """Update the record of a session, and warn it at its next edit."""
        conflicts = {
            (other if me == one else one).task: tuple(sorted(paths)[:MAX_PATHS])
            for (one, other), paths in self._conflicts.items()
            if me in {one, other}
        }
        if self._context.session_service is not None:
            await self._context.session_service.record_conflicts(me, conflicts, warning)

    async def _replace_note(self, me: SessionName, other: SessionName, text: str | None, paths: Sequence[str]) -> None:
        """Replace the note of a session about its conflict with another; without `text`, delete it."""
        if self._context.session_service is None:
            return
        notes, before = self._context.session_service.notes, self._notes.pop((me, other), None)
        with suppress(RefusedError, StoreUnavailable):  # deleted by a user
            if before is not None:
                await notes.drop(before)
        with suppress(LeaseLost, RefusedError, StoreUnavailable):
            if text is not None:
                note = await notes.add(me, text, topic=_NOTE_TOPIC, paths=[escape_path(path) for path in paths])
                self._notes[me, other] = note.id
