"""What sessions tell each other while they are at work: a small record each, and what follows from many. Pure."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.session_names import SessionName

#: Seconds without a word after which a record says nothing about now any more.
STALE_CONTEXT_SECONDS: Final = 1800.0
#: Characters of a message that are kept, and of what is told of progress.
MAX_MESSAGE_CHARS, MAX_PROGRESS_CHARS = 500, 40
#: Characters of a path.
MAX_PATH_CHARS: Final = 4096

#: Tools that only look: a session that reads a file is not at work on it.
_LOOKING: Final = re.compile(r"_?(read|view|open|cat|ls\b|list|glob|grep|rg\b|search|find|fetch|web)", re.IGNORECASE)


class SessionStatus(StrEnum):
    """How a session says that it does."""

    WORKING = "working"
    BLOCKED = "blocked"  #: it can't go on before something happens that it named
    WAITING = "waiting"  #: for files that another session holds
    DONE = "done"  #: it has said so, or has ended


class SessionContext(BaseModel):
    """What one session is at. Times are wall-clock seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    run: str
    task: str
    attempt: int
    adapter: str
    orchestrator: str
    """The id of the process that runs it."""
    scope: str
    """The repository and target that it works for: only sessions of one scope can be in each other's way."""
    status: SessionStatus = SessionStatus.WORKING
    file: str | None = None
    """The file that it is at, from the top of the repository."""
    progress: str | None = None
    """How far it is, in its own words, as `50%` or `3 of 7`."""
    message: str | None = None
    """What it does, in its own words."""
    seen: str | None = None
    """What it was seen to do last, by what its program prints: there without its saying anything."""
    blocked_on: str | None = None
    """What it waits for."""
    files: tuple[str, ...] = ()
    """The files that it has locked."""
    started: Instant
    updated: Instant

    @property
    def session(self) -> SessionName:
        """Whose it is."""
        return SessionName(self.run, self.task, self.attempt)

    @property
    def words(self) -> str | None:
        """What it does: as it says itself, else as it was seen."""
        return self.message or self.seen

    def is_on(self, path: str) -> bool:
        """Whether it is at work on a file, or has it locked."""
        return path in self.files or (path == self.file and self.status is not SessionStatus.DONE)

    def to_json(self) -> dict[str, Any]:
        """Return the object that programs get."""
        return self.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """The sessions of one task at a glance."""

    task: str
    by_status: Mapping[SessionStatus, int]
    """How many there are of each status; those of none count 0."""
    files: Sequence[str]
    """What they are at and have locked, each once, in order."""
    sessions: Sequence[SessionContext]

    @property
    def total(self) -> int:
        """How many sessions there are."""
        return len(self.sessions)


def filter_active(contexts: Iterable[SessionContext]) -> list[SessionContext]:
    """Return those that are not done."""
    return [one for one in contexts if one.status is not SessionStatus.DONE]


def find_sessions_on(contexts: Iterable[SessionContext], path: str) -> list[SessionContext]:
    """Return the sessions that are at work on a file, or have it locked: a conflict, where they are several."""
    return [one for one in contexts if one.is_on(path)]


def find_file_conflicts(contexts: Iterable[SessionContext]) -> dict[str, list[SessionContext]]:
    """Return each file that several sessions are on, with these; two attempts at one task are two sessions."""
    found: dict[str, list[SessionContext]] = {}
    for one in contexts:
        for path in sorted({*one.files, *([one.file] if one.file else [])}):
            if one.is_on(path):
                found.setdefault(path, []).append(one)
    return {path: sessions for path, sessions in sorted(found.items()) if len(sessions) > 1}


def summarize_task(task: str, contexts: Iterable[SessionContext]) -> TaskSummary:
    """Return what the sessions of a task come to."""
    sessions = [one for one in contexts if one.task == task]
    counts = Counter(one.status for one in sessions)
    files = {path for one in sessions for path in (*one.files, *([one.file] if one.file else []))}
    return TaskSummary(task, {status: counts[status] for status in SessionStatus}, sorted(files), sessions)


def filter_stale(
    contexts: Iterable[SessionContext], now: float, after: float = STALE_CONTEXT_SECONDS
) -> list[SessionContext]:
    """Return those that nothing was heard of for `after` seconds."""
    return [one for one in contexts if now - one.updated >= after]


def normalize_path(path: str, tops: Iterable[str]) -> str | None:
    """Return a path from the top of the repository, as `/`-separated text without `.` and `..`; None if it is outside.

    A relative one starts at the top; `tops` are the names that an absolute one may give to the top.
    """
    if path.startswith("/"):
        inside = [path[len(top) + 1 :] for top in tops if path.startswith(f"{top}/")]
        if not inside:
            return None
        path = inside[0]
    found = posixpath.normpath(path) if path and "\0" not in path else "."
    return None if found in {".", ".."} or found.startswith(("../", "/")) else found


def find_edited_file(tool: str, paths: Sequence[str], tops: Iterable[str]) -> str | None:
    """Return the file that a session is at, by a tool that it used; None where that only looks, or names none."""
    if _LOOKING.match(tool):
        return None
    found = [inside for path in paths if (inside := normalize_path(path, tops)) is not None]
    return found[-1] if found else None
