"""Read state in earlier formats, and preserve unreadable files. Blocks."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from orchestrator.domain.runs.legacy import (
    LegacySession,
    UnknownLayout,
    merge_layouts,
    merge_task_states,
    parse_session,
    parse_sessions,
    parse_task_fields,
    parse_time,
    read_version,
    task_name,
)
from orchestrator.domain.wording import join_names
from orchestrator.project import LEGACY_FILE, LEGACY_TREE, Project
from orchestrator.system import untrusted_files

MAX_FILE: Final = 64 << 20
#: The maximum number of files in a tree, and their maximum total bytes.
MAX_FILES: Final = 20_000
MAX_TREE: Final = 256 << 20
#: The maximum number of sessions, and of their tasks in total.
MAX_SESSIONS: Final = 10_000
MAX_TASKS: Final = 50_000
#: The maximum number of reported errors per file.
_MOST_REPORTED: Final = 5
_VERSION_FILE = re.compile(r"v(\d{1,15})\.json")


@dataclass(frozen=True, slots=True)
class LegacySource:
    """A file or folder that was read; `path` is relative to the project."""

    path: str
    version: str | None
    """The session's version in the file of all sessions."""
    files: int
    bytes: int
    sha256: str
    """The digest of the file or, for a folder, of the names and digests of its files."""


@dataclass(frozen=True, slots=True)
class LegacyProblem:
    """A file that was not imported completely: reason, and path of a copy, if any."""

    path: str
    reason: str
    copy: str | None


@dataclass(slots=True)
class LegacyFiles:
    """The sessions read, and the problems found."""

    sessions: list[LegacySession] = field(default_factory=list)
    written: dict[str, float] = field(default_factory=dict)
    """The modification times of files, keyed by name."""
    sources: list[LegacySource] = field(default_factory=list)
    problems: list[LegacyProblem] = field(default_factory=list)


def read_legacy_files(project: Project) -> LegacyFiles:
    """Read both layouts; if values differ, the newer one counts. Blocks."""
    found = LegacyFiles()
    reader = _Reader(project, found)
    older = _read_file(reader)
    newer = _read_tree(reader)
    found.sessions = merge_layouts(older, newer)
    if len(found.sessions) > MAX_SESSIONS:
        beyond = found.sessions[MAX_SESSIONS]
        reader.problem(
            beyond.source, f"only the first {MAX_SESSIONS} of {len(found.sessions)} sessions were imported", None
        )
        del found.sessions[MAX_SESSIONS:]
    tasks, kept = 0, []
    for one in found.sessions:
        tasks += len(one.tasks)
        if tasks <= MAX_TASKS:
            kept.append(one)
        else:
            tasks -= len(one.tasks)
            reader.problem(one.source, f"session {one.name} has too many tasks, {len(one.tasks)}", None)
    found.sessions = kept
    return found


def _read_file(reader: _Reader) -> list[LegacySession]:
    data = reader.read(LEGACY_FILE)
    if data is None:
        return []
    errors: list[str] = []
    version, sessions = None, []
    try:
        state = _decoded(data)
        version, sessions = read_version(state), parse_sessions(state, LEGACY_FILE, errors)
    except ValueError as error:
        errors.append(str(error))
    if errors:
        reader.problem(LEGACY_FILE, _join_errors(errors), data)
    if sessions or not errors:
        digest = hashlib.sha256(data).hexdigest()
        reader.found.sources.append(LegacySource(LEGACY_FILE, version, 1, len(data), digest))
    return sessions


def _read_tree(reader: _Reader) -> list[LegacySession]:
    lost: list[str] = []
    sessions: list[LegacySession] = []
    for path in reader.names(f"{LEGACY_TREE}/sessions", ".json"):
        stem = path.rpartition("/")[2].removesuffix(".json")
        errors: list[str] = []
        data = reader.read(path)
        try:
            if data is not None:
                sessions.append(parse_session(_decoded(data), path, stem, errors))
        except ValueError as error:
            errors.append(str(error))
            lost.append(stem)
        if errors:
            reader.problem(path, _join_errors(errors), data)
    states: dict[str, Any] = {}
    for folder in reader.names(f"{LEGACY_TREE}/tasks", ""):
        fallback = folder.rpartition("/")[2].removeprefix("task-")
        if (state := _task_state(reader, folder)) is not None:
            states[task_name(state, fallback)] = state
    sessions += _from_checkpoints(reader, lost, states)
    if reader.digests:
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(reader.digests.items()))
        digest = hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()
        reader.found.sources.append(LegacySource(LEGACY_TREE, None, len(reader.digests), reader.total, digest))
    return merge_task_states(sessions, states, LEGACY_TREE)


def _task_state(reader: _Reader, folder: str) -> dict[str, Any] | None:
    """Return a task's newest readable state: its own, or one of its history."""
    path = f"{folder}/state.json"
    data = reader.read(path)
    if data is None:
        return None
    try:
        return _object(data)
    except ValueError as error:
        why = str(error)
    versions = [(int(match[1]), name) for name in reader.names(f"{folder}/history", ".json")
                if (match := _VERSION_FILE.fullmatch(name.rpartition("/")[2]))]  # fmt: skip
    for number, name in sorted(versions, reverse=True):
        with suppress(ValueError):
            if (older := reader.read(name)) is not None:
                state = _object(older)
                reader.problem(path, f"{why}; replaced with version {number} from its history", data)
                return state
    reader.problem(path, why, data)
    return None


def _from_checkpoints(reader: _Reader, lost: Sequence[str], states: dict[str, Any]) -> list[LegacySession]:
    """Return unreadable sessions as of their newest checkpoints."""
    newest: dict[str, tuple[float, str, dict[str, Any]]] = {}
    for path in reader.names(f"{LEGACY_TREE}/checkpoints", ".json") if lost else ():
        with suppress(ValueError):
            if (data := reader.read(path)) is not None:
                found = _object(data)
                of, time = found.get("session_id"), parse_time(found.get("timestamp")) or 0.0
                if isinstance(of, str) and of in lost and (of not in newest or time > newest[of][0]):
                    newest[of] = time, path, found
    sessions = []
    for of, (_, path, found) in newest.items():
        with suppress(UnknownLayout):
            sessions.append(parse_session(found.get("session_state"), path, of, []))
            then = found.get("task_states")
            for task, state in then.items() if isinstance(then, dict) else ():
                if isinstance(state, dict):
                    states.setdefault(task, state)
    return sessions


def _decoded(data: bytes) -> Any:
    try:
        return orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise UnknownLayout(f"it is not JSON: {error}" if data.strip() else "it is empty") from None


def _object(data: bytes) -> dict[str, Any]:
    value = parse_task_fields(_decoded(data))
    if not value:
        raise UnknownLayout("it is not an object with fields")
    return dict(value)


def _join_errors(errors: Sequence[str]) -> str:
    return join_names(errors, _MOST_REPORTED, "; ")


class _Reader:
    """A reader of a project's untrusted files.

    It has limits, and does not follow links out of the project.
    """

    def __init__(self, project: Project, found: LegacyFiles) -> None:
        self._project, self.found = project, found
        self._top = project.top.resolve()
        self.digests: dict[str, str] = {}
        """The digests of the files in the tree, keyed by name."""
        self.total = 0

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; record a problem if it is not readable.

        Returns None if the file is missing or unreadable.
        """
        try:
            data, changed = self._load(name)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, UnknownLayout) as error:  # RuntimeError: a cycle of links
            self.problem(name, _why(error), None)
            return None
        if name != LEGACY_FILE:
            self.total += len(data)
            self.digests[name] = hashlib.sha256(data).hexdigest()
        self.found.written[name] = changed
        return data

    def _load(self, name: str) -> tuple[bytes, float]:
        with os.fdopen(untrusted_files.open_file(self._top, self._real(name)), "rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_size > MAX_FILE:
                raise UnknownLayout(f"it has {facts.st_size} bytes (limit: {MAX_FILE})")
            if self.total + facts.st_size > MAX_TREE:
                raise UnknownLayout(f"the files up to this one exceed {MAX_TREE} bytes in total")
            return file.read(facts.st_size), facts.st_mtime

    def _real(self, name: str) -> str:
        """Return a path's current target, relative to the top.

        Files are opened only by `untrusted_files`.
        """
        real = (self._project.top / name).resolve(strict=True)
        if not real.is_relative_to(self._top):
            raise UnknownLayout("a link leads out of the project")
        return str(real.relative_to(self._top))

    def names(self, folder: str, ending: str) -> list[str]:
        """Return the sorted paths in a folder with a suffix, relative to the project."""
        try:
            with untrusted_files.open_folder(self._top, self._real(folder)) as descriptor:
                found = sorted(name for name in os.listdir(descriptor) if name.endswith(ending))  # noqa: PTH208  (takes a descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, RuntimeError, UnknownLayout) as error:
            self.problem(folder, _why(error), None)
            return []
        if len(found) > MAX_FILES:
            self.problem(folder, f"only the first {MAX_FILES} of {len(found)} entries were read", None)
        return [f"{folder}/{name}" for name in found[:MAX_FILES]]

    def problem(self, name: str, reason: str, data: bytes | None) -> None:
        """Record a problem with a file, and keep a copy of its content."""
        self.found.problems.append(LegacyProblem(_text(name), reason, None if data is None else self._copy(name, data)))

    def _copy(self, name: str, data: bytes) -> str | None:
        folder = self._project.legacy
        path = folder / f"{hashlib.sha256(data).hexdigest()[:12]}-{Path(name).name}"
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
                file.write(data)
            return _text(str(path.relative_to(self._project.top)))
        return None


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _text(name: str) -> str:
    """Return a file name, which may contain any bytes, as text."""
    return os.fsencode(name).decode(errors="replace")
