"""Convert sessions of older state layouts to documents of finished runs. Pure.

There are two layouts: one file with all sessions (versions 1 and 2.0), and a folder with a file for each session and
each task. Various scripts wrote them, so parsing is lenient: sessions are a list or a mapping by id, tasks too, or only
a status, names are in snake_case or camelCase, times are ISO 8601 texts or numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from orchestrator.domain.documents.times import LATEST
from orchestrator.domain.runs.model import ImportedRun, ImportedTask, RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import TaskStatus

#: The session of tasks that do not belong to any recorded session.
NO_SESSION: Final = "tasks-without-session"
#: The maximum size of options, metrics or phases in documents, in bytes of JSON; larger ones are omitted.
MAX_PART: Final = 64 << 10
#: The maximum size of an original, in bytes of JSON.
MAX_ORIGINAL: Final = 1 << 20
#: The maximum nesting depth of an original.
MAX_DEPTH: Final = 100
_MILLISECONDS_FROM: Final = 1e11
_MAX_TEXT: Final = 2000
_MAX_PULL_REQUEST: Final = 1 << 53

_COMPLETED: Final = frozenset(
    {"completed", "complete", "done", "success", "successful", "succeeded", "finished", "merged", "landed"}
)
_FAILED: Final = frozenset({"failed", "failure", "error", "errored"})
_CANCELLED: Final = frozenset({"cancelled", "canceled", "aborted", "stopped", "skipped"})
_STARTED: Final = frozenset({"in_progress", "running", "active", "started"})
_WAITING: Final = frozenset(
    {"pending", "waiting", "queued", "blocked", "initialized", "created", "not_started", "todo"}
)

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_INVALID_CHARACTERS: Final = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_NAME_PREFIX: Final = 40


class UnknownLayout(ValueError):
    """A file matches no known layout."""


@dataclass(frozen=True, slots=True)
class LegacySession:
    """A session as read from files: its own fields, and those of each task by name."""

    name: str
    source: str
    """The file from which it was read."""
    fields: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]

    def merge(self, older: LegacySession) -> LegacySession:
        """Return this session plus the fields that only an older record of it has."""
        tasks = {
            **older.tasks,
            **{name: {**older.tasks.get(name, {}), **fields} for name, fields in self.tasks.items()},
        }
        return LegacySession(self.name, self.source, {**older.fields, **self.fields}, tasks)


@dataclass(frozen=True, slots=True)
class ConvertedSession:
    """A session converted to council's documents."""

    run: RunDocument
    tasks: Mapping[str, TaskDocument]
    original: Mapping[str, Any]
    """The original fields of the session, or the reason for their omission."""
    originals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The same for each task."""


def read_version(state: object) -> str:
    """Return the version in a file of sessions; `1` if there is none."""
    version = state.get("version") if isinstance(state, dict) else None
    return str(version) if isinstance(version, str | int | float) else "1"


def parse_sessions(state: object, source: str, faults: list[str]) -> list[LegacySession]:
    """Return the sessions of a file; report invalid ones in `faults`.

    Raises UnknownLayout if it has no list or mapping of sessions.
    """
    if isinstance(state, dict) and "sessions" not in state:
        # In the first version, the whole file is one session.
        if any(_get(state, name) is not None for name in ("tasks", "id", "session_id", "started_at")):
            return [parse_session(state, source, "session-1", faults)]
        if state.keys() <= {"version"}:
            return []
        raise UnknownLayout("it has no sessions")
    sessions = state.get("sessions") if isinstance(state, dict) else state
    if isinstance(sessions, dict):
        named = list(sessions.items())
    elif isinstance(sessions, list):
        named = [(f"session-{number}", session) for number, session in enumerate(sessions, 1)]
    else:
        raise UnknownLayout("its sessions are neither a list nor an object")
    faults += [f"{name} is not an object" for name, session in named if not isinstance(session, dict)]
    return [parse_session(session, source, name, faults) for name, session in named if isinstance(session, dict)]


def parse_session(value: object, source: str, fallback: str, faults: list[str]) -> LegacySession:
    """Return a session, named `fallback` by default; raise UnknownLayout if invalid."""
    if not isinstance(value, dict):
        raise UnknownLayout("it is not an object")
    name = _name(_get(value, "id"), _get(value, "session_id")) or fallback
    tasks = dict(_tasks(name, _get(value, "tasks"), faults))
    listed = _get(value, "task_ids")
    for entry in listed if isinstance(listed, list) else ():
        if (task := _name(entry)) is not None:
            tasks.setdefault(task, {})
    return LegacySession(name, source, {key: field for key, field in value.items() if key != "tasks"}, tasks)


def _tasks(session: str, tasks: object, faults: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(tasks, dict):
        for name, task in tasks.items():
            if (fields := parse_task_fields({"status": task} if isinstance(task, str) else task)) is None:
                faults.append(f"task {name} of {session} is not an object")
            else:
                yield name, fields
    elif isinstance(tasks, list):
        for number, task in enumerate(tasks, 1):
            if (fields := parse_task_fields({"id": task} if isinstance(task, str | int) else task)) is None:
                faults.append(f"task {number} of {session} is not an object")
            else:
                yield _name(*(_get(fields, key) for key in ("id", "task_id", "name"))) or f"task-{number}", fields
    elif tasks is not None:
        faults.append(f"the tasks of {session} are neither a list nor an object")


def parse_task_fields(value: object) -> Mapping[str, Any] | None:
    """Return the fields of a task from its object; None if it is not an object."""
    if value is None:
        return {}
    return value if isinstance(value, dict) else None


def task_name(state: Mapping[str, Any], fallback: str) -> str:
    """Return the name of a task with a separate file."""
    return _name(_get(state, "task_id"), _get(state, "id")) or fallback


def merge_layouts(older: Iterable[LegacySession], newer: Iterable[LegacySession]) -> list[LegacySession]:
    """Return all sessions, merging those in both layouts.

    Other sessions with equal names get distinct names.
    """
    known: dict[str, LegacySession] = {}
    for group in (older, newer):
        seen: set[str] = set()
        for session in group:
            name, number = session.name, 1
            while name in seen:
                number += 1
                name = f"{session.name}-{number}"
            seen.add(name)
            named = LegacySession(name, session.source, session.fields, session.tasks)
            known[name] = named.merge(known[name]) if name in known else named
    return list(known.values())


def merge_task_states(
    sessions: Sequence[LegacySession], states: Mapping[str, Mapping[str, Any]], source: str
) -> list[LegacySession]:
    """Return sessions with the states of their tasks.

    Tasks without a session become a session from `source`.
    """
    merged = [
        LegacySession(
            session.name,
            session.source,
            session.fields,
            {task: {**fields, **states.get(task, {})} for task, fields in session.tasks.items()},
        )
        for session in sessions
    ]
    named = {task for session in sessions for task in session.tasks}
    owned: dict[str, dict[str, Mapping[str, Any]]] = {}
    for task, state in states.items():
        if task not in named:
            owned.setdefault(_name(_get(state, "session_id")) or NO_SESSION, {})[task] = state
    indexes = {session.name: index for index, session in enumerate(merged)}
    for name, tasks in owned.items():
        if name in indexes:
            session = merged[indexes[name]]
            merged[indexes[name]] = LegacySession(name, session.source, session.fields, {**session.tasks, **tasks})
        else:
            merged.append(LegacySession(name, source, {}, tasks))
    return merged


def convert_session(session: LegacySession, *, top: str, hub: str, written: float, now: float) -> ConvertedSession:
    """Return a session as a finished run.

    `top` is the project folder, and `hub` a placeholder for its repositories, which never existed. Missing times are
    replaced by `written`, the modification time of the file, and future times by `now` (wall-clock seconds).
    """
    names = _safe_names(session.tasks)
    tasks = {names[name]: _task(fields, session.source) for name, fields in session.tasks.items()}
    imported = [task.imported for task in tasks.values() if task.imported is not None]
    times = [time for task in imported for time in (task.started, task.completed) if time is not None]
    updates = [
        time for name in ("completed_at", "ended_at", "updated_at") if (time := _time(session.fields, name)) is not None
    ]
    started = _time(session.fields, "started_at", "created_at")
    if started is None:
        started = min([*times, *updates], default=written)
    started = min(started, now)
    ended = min(max([*updates, *times], default=written), now)
    options, metrics = (_part(_get(session.fields, name)) for name in ("options", "metrics"))
    branch = next((text for name in ("target", "target_branch", "base_branch", "base")
                   if (text := _text(options.get(name), 200)) is not None), "")  # fmt: skip
    run = RunDocument(
        id=safe_name(session.name),
        config=session.source,
        repo=top,
        is_url=False,
        base=branch,
        target=branch,
        adapters={},
        tasks=tuple(tasks),
        start="",
        hub=hub,
        started=started,
        ended=max(started, ended),
        imported=ImportedRun(
            source=session.source, status=_text(_get(session.fields, "status"), 200), options=options, metrics=metrics
        ),
    )
    originals = {names[name]: _original(fields) for name, fields in session.tasks.items()}
    return ConvertedSession(run, tasks, _original(session.fields), originals)


def _task(fields: Mapping[str, Any], source: str) -> TaskDocument:
    recorded = _text(_get(fields, "status"), 200)
    status, reason = _status(recorded, source)
    error = next((text for name in ("error", "failure_reason", "reason")
                  if (text := _text(_get(fields, name), _MAX_TEXT)) is not None), None)  # fmt: skip
    number = next(
        (found for name in ("pr_number", "pull_request", "pr") if (found := _number(_get(fields, name)))), None
    )
    return TaskDocument(
        status=status,
        reason=error if error is not None and status is not TaskStatus.LANDED else reason,
        pull_request=number,
        imported=ImportedTask(
            status=recorded,
            started=_time(fields, "started_at"),
            completed=_time(fields, "completed_at", "ended_at"),
            branch=_text(_get(fields, "branch"), _MAX_TEXT),
            worktree=_text(_get(fields, "worktree"), _MAX_TEXT),
            phases=_phases(_get(fields, "phases")),
            metrics=_part(_get(fields, "metrics")),
        ),
    )


def _status(recorded: str | None, source: str) -> tuple[TaskStatus, str]:
    """Return the final status for a recorded one, with the reason."""
    status = _normalize_status(recorded)
    if status in _COMPLETED:
        return TaskStatus.LANDED, f"{source} records it as {recorded}, without proof"
    if status in _FAILED:
        return TaskStatus.FAILED, f"{source} records {recorded!r}"
    if status in _CANCELLED:
        return TaskStatus.CANCELLED, f"{source} records it as {recorded}"
    if status == "conflict":
        return TaskStatus.CONFLICT, f"{source} records {recorded!r}"
    if status in _STARTED:
        return TaskStatus.CANCELLED, f"it was {recorded} when its session was abandoned"
    if status in _WAITING or recorded is None:
        return TaskStatus.CANCELLED, "it had not started when its session was abandoned"
    return TaskStatus.CANCELLED, f"{source} records the unknown status {recorded!r}"


def is_unfinished(task: ImportedTask) -> bool:
    """Return whether a task was unfinished when its session was abandoned."""
    status = _normalize_status(task.status)
    return status in _STARTED or status in _WAITING or not status


def _normalize_status(status: str | None) -> str:
    return "" if status is None else re.sub(r"[\s-]+", "_", status.strip().casefold())


def safe_name(name: str) -> str:
    """Return a name that is valid in keys, refs and paths.

    An invalid name is shortened and gets a digest.
    """
    if _NAME.fullmatch(name) and ".." not in name and not name.endswith((".", ".lock")) and name != "all":
        return name
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]
    kept = re.sub(r"\.\.+", ".", _INVALID_CHARACTERS.sub("-", name)).strip(".-_")[:_MAX_NAME_PREFIX].strip(".-_")
    return f"{kept}-{digest}" if kept else f"unnamed-{digest}"


def _safe_names(names: Iterable[str]) -> dict[str, str]:
    return {name: safe_name(name) for name in names}


def _get(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field by its name in snake_case or camelCase, or None."""
    first, *rest = name.split("_")
    value = fields.get(name)
    return fields.get(first + "".join(map(str.capitalize, rest))) if value is None else value


def _name(*values: object) -> str | None:
    for value in values:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    return None


def _text(value: object, limit: int) -> str | None:
    if not isinstance(value, str) or not value:
        return None
    return value if len(value) <= limit else f"{value[:limit]}…"


def _number(value: object) -> int | None:
    """Return a pull request's number from a number, `#12`, a URL or an object."""
    if isinstance(value, dict):
        return _number(value.get("number"))
    if isinstance(value, str) and (found := re.search(r"(?:^#?|/)(\d{1,15})/?$", value.strip())):
        value = int(found[1])
    is_one = isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MAX_PULL_REQUEST
    return value if is_one else None  # type: ignore[return-value]  # checked by `is_one`


def _time(fields: Mapping[str, Any], *names: str) -> float | None:
    """Return the first of these fields with a time, in UTC by default."""
    return next((found for name in names if (found := parse_time(_get(fields, name))) is not None), None)


def parse_time(value: object) -> float | None:
    """Return wall-clock seconds from an ISO 8601 text or a number; None if invalid.

    A large number counts milliseconds.
    """
    if isinstance(value, str):
        try:
            parsed = datetime.fromisoformat(value.strip())
            seconds = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value) / (1000 if value >= _MILLISECONDS_FROM else 1)
    else:
        return None
    return seconds if math.isfinite(seconds) and 0 <= seconds <= LATEST else None


def _phases(value: object) -> dict[str, Any]:
    if isinstance(value, list):
        value = {_phase_name(one) or f"phase-{number}": one for number, one in enumerate(value, 1)}
    return _part(value)


def _phase_name(value: object) -> str | None:
    return _name(*(_get(value, key) for key in ("name", "id", "phase"))) if isinstance(value, dict) else _name(value)


def _part(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) and _omission(value, MAX_PART) is None else {}


def _original(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    omission = _omission(fields, MAX_ORIGINAL)
    return {"fields": dict(fields)} if omission is None else {"omitted": omission}


def _omission(value: object, limit: int) -> str | None:
    """Return the reason to omit a value; None if it is retained."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            size = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
            return None if size <= limit else f"its {size} bytes are more than {limit}"
    return f"it is nested more than {MAX_DEPTH} levels deep"
