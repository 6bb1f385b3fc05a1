"""Contexts that active sessions share with each other, and summaries of them."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from pydantic import Field

from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.session_names import SessionName

#: Seconds without an update after which a context is stale.
STALE_CONTEXT_SECONDS: Final = 1800.0
#: The longest stored message and progress text, in characters.
MAX_MESSAGE_CHARS, MAX_PROGRESS_CHARS = 500, 40
#: The longest path, in characters.
MAX_PATH_CHARS: Final = 4096

#: Read-only tools: reading a file does not count as working on it.
_READ_ONLY: Final = re.compile(r"_?(read|view|open|cat|ls\b|list|glob|grep|rg\b|search|find|fetch|web)", re.IGNORECASE)


class SessionStatus(StrEnum):
    """The status that a session reports."""

    WORKING = "working"
    BLOCKED = "blocked"  #: it can't continue before an event, see `blocked_on`
    WAITING = "waiting"  #: it waits for files that another session has locked
    DONE = "done"  #: it has reported its end, or has ended


class SessionContext(StoredDocument):
    """The current state of one session. Times are wall-clock seconds."""

    run: str
    task: str
    attempt: int
    adapter: str
    orchestrator: str
    """The id of the orchestrator that runs it."""
    scope: str
    """Its repository and target: only sessions with the same scope can conflict."""
    status: SessionStatus = SessionStatus.WORKING
    file: str | None = None
    """The file that it works on, relative to the root of the repository."""
    progress: str | None = None
    """Its self-reported progress, such as `50%` or `3 of 7`."""
    message: str | None = None
    """Its self-reported activity."""
    seen: str | None = None
    """Its last activity, as observed in the output of its program."""
    blocked_on: str | None = None
    """The reason that it is blocked."""
    files: tuple[str, ...] = ()
    """The files that it has locked."""
    conflicts: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """The paths of its predicted merge conflicts, by other task."""
    started: Instant
    updated: Instant

    @property
    def session(self) -> SessionName:
        """The name of the session."""
        return SessionName(self.run, self.task, self.attempt)

    @property
    def words(self) -> str | None:
        """Its activity: self-reported, else observed."""
        return self.message or self.seen

    def is_on(self, path: str) -> bool:
        """Return whether it works on a file, or has it locked."""
        return path in self.files or (path == self.file and self.status is not SessionStatus.DONE)

    def to_json(self) -> dict[str, Any]:
        """Return the context as a JSON object."""
        return self.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """A summary of the sessions of one task."""

    task: str
    by_status: Mapping[SessionStatus, int]
    """Session counts by status, including zeros."""
    files: Sequence[str]
    """The files that they work on or have locked, sorted and unique."""
    sessions: Sequence[SessionContext]

    @property
    def total(self) -> int:
        """The number of sessions."""
        return len(self.sessions)


def filter_active(contexts: Iterable[SessionContext]) -> list[SessionContext]:
    """Return the contexts that are not done."""
    return [context for context in contexts if context.status is not SessionStatus.DONE]


def find_file_conflicts(contexts: Iterable[SessionContext]) -> dict[str, list[SessionContext]]:
    """Return the sessions of each file that has several, counted by attempt."""
    by_file: dict[str, list[SessionContext]] = {}
    for context in contexts:
        for path in sorted({*context.files, *([context.file] if context.file else [])}):
            if context.is_on(path):
                by_file.setdefault(path, []).append(context)
    return {path: sessions for path, sessions in sorted(by_file.items()) if len(sessions) > 1}


def summarize_task(task: str, contexts: Iterable[SessionContext]) -> TaskSummary:
    """Return a summary of the sessions of a task."""
    sessions = [context for context in contexts if context.task == task]
    counts = Counter(session.status for session in sessions)
    files = {path for each in sessions for path in (*each.files, *([each.file] if each.file else []))}
    return TaskSummary(task, {status: counts[status] for status in SessionStatus}, sorted(files), sessions)


def filter_stale(
    contexts: Iterable[SessionContext], now: float, after: float = STALE_CONTEXT_SECONDS
) -> list[SessionContext]:
    """Return the contexts without an update for `after` seconds."""
    return [context for context in contexts if now - context.updated >= after]


def normalize_path(path: str, tops: Iterable[str]) -> str | None:
    """Return a path relative to the root of the repository; None if outside.

    Relative paths start at the root; `tops` are its possible absolute paths.
    """
    if path.startswith("/"):
        inside = [path[len(top) + 1 :] for top in tops if path.startswith(f"{top}/")]
        if not inside:
            return None
        path = inside[0]
    normalized = posixpath.normpath(path) if path and "\0" not in path else "."
    return None if normalized in {".", ".."} or normalized.startswith(("../", "/")) else normalized


def find_edited_file(tool: str, paths: Sequence[str], tops: Iterable[str]) -> str | None:
    """Return the file that a tool call edits; None if it edits no known file."""
    if _READ_ONLY.match(tool):
        return None
    edited = [inside for path in paths if (inside := normalize_path(path, tops)) is not None]
    return edited[-1] if edited else None
