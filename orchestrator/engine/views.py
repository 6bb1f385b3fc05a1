"""Export of the whole state as readable files, which are never read back."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

import anyio
import anyio.to_thread
import orjson
from pydantic import ValidationError

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES
from orchestrator.engine.reports.task_report import report_session
from orchestrator.errors import HistoryCompacted, RefusedError
from orchestrator.project import Project
from orchestrator.protocols import VERSIONS_KEPT, CommitRecord, Document, DocumentVersion, Event, JsonObject, Key, Store
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.state.documents.log_reader import read_range
from orchestrator.state.documents.validation import DOCUMENT_KINDS
from orchestrator.system.failpoints import failpoint
from orchestrator.system.file_lock import FileLock

#: The size of `events.jsonl` in bytes at which its older half is removed.
EVENTS_BYTES: Final = 16 << 20

_ABOUT: Final = (
    "Readable copies of the state log, which are never read back: changing or deleting them has no effect. "
    "`council state views` writes them again."
)
#: The number of records or documents that are processed at once, which limits the memory.
_PART: Final = 256
#: Seconds to wait for another process that exports the state.
_LOCK_TIMEOUT: Final = 30.0
#: The maximum seconds for writing versions of tasks that are older than the log: each is looked up individually.
_HISTORY_LIMIT: Final = 15.0


@dataclass(frozen=True, slots=True)
class ViewPosition:
    """The last commit in the views: position (0: none), wall-clock time and writer."""

    position: int = 0
    time: float = 0.0
    writer: str = ""


async def export_views(store: Store, project: Project, now: float) -> ViewPosition:
    """Replace a project's views as of `now`; return their position.

    `now` is in wall-clock seconds. Raises LockHeld if another process exports them and does not finish in time,
    RefusedError if something other than a folder has the name of their folder, OSError if they can't be written.
    """
    async with FileLock(project.views_lock).hold(_LOCK_TIMEOUT):
        await anyio.to_thread.run_sync(_remove_leftovers, project.views)
        folder = ViewFolder(project.views.with_name(f"{project.views.name}.{token_hex(4)}.new"))
        try:
            position = await _write_views(store, folder, now)
            await anyio.to_thread.run_sync(folder.install, project.views)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(shutil.rmtree, folder.path, ignore_errors=True))
    return position


async def _write_views(store: Store, folder: ViewFolder, now: float) -> ViewPosition:
    until, damage = await store.position(), [one.describe() for one in store.damage]
    position, kinds = ViewPosition(), set(DOCUMENT_KINDS)
    newest = {one.key: one.version for one in await store.list("task")}
    written = Counter[Key]()
    async for records in _read_log(store, until):
        kinds.update(key.kind for record in records for key in record.documents)
        versions = list(_versions(records, newest))
        written.update(key for key, _ in versions)
        await anyio.to_thread.run_sync(folder.write_records, records, versions)
        position = ViewPosition(records[-1].position, records[-1].time, records[-1].writer)
    with anyio.move_on_after(_HISTORY_LIMIT):
        for key in [key for key, version in newest.items() if written[key] < min(version, VERSIONS_KEPT)]:
            history = [(key, one) for one in await store.history(key)]
            await anyio.to_thread.run_sync(folder.write_records, (), history)
    documents = await _read_documents(store, until, kinds)
    for start in range(0, len(documents), _PART):
        await anyio.to_thread.run_sync(folder.write_documents, list(documents.values())[start : start + _PART])
    await anyio.to_thread.run_sync(folder.write_sessions, documents)
    index = {"about": _ABOUT, **asdict(position), "updated": now, "damage": damage}
    await anyio.to_thread.run_sync(folder.write, "index.json", index)
    failpoint("views.written")
    return position


async def _read_log(store: Store, until: int) -> AsyncGenerator[list[CommitRecord]]:
    """Yield the readable commits up to a position, in parts; pruned ones are omitted."""
    after: int | None = 0
    while after is not None:
        part = list[CommitRecord]()
        try:
            async with aclosing(read_range(store, after, until)) as records:
                async for record in records:
                    part.append(record)
                    if len(part) == _PART:
                        yield part
                        part = []
            after = None
        except HistoryCompacted as gone:
            after = gone.first
        if part:
            yield part


async def _read_documents(store: Store, until: int, kinds: set[str]) -> Mapping[Key, Document]:
    """Return the documents at a position, or the current ones if the log is damaged.

    Damage may hide older documents.
    """
    with suppress(HistoryCompacted):
        if not store.damage:
            return (await store.at(until)).documents
    return {one.key: one for kind in sorted(kinds) for one in await store.list(kind)}


def _versions(records: Sequence[CommitRecord], newest: Mapping[Key, int]) -> list[tuple[Key, DocumentVersion]]:
    """Return the last versions of tasks that these records wrote.

    `newest` is the current version of each task.
    """
    return [
        (key, DocumentVersion(version, record.position, record.time, record.writer, value, record.events))
        for record in records
        for key, (version, value) in record.documents.items()
        if key in newest and version > newest[key] - VERSIONS_KEPT
    ]


class ViewFolder:
    """A new folder of views. All methods block."""

    def __init__(self, path: Path, events_bytes: int = EVENTS_BYTES) -> None:
        """Create the folder."""
        path.mkdir(mode=0o700)
        self.path, self._events_bytes = path, events_bytes
        self._made = {""}
        self._append(b"")

    def write(self, name: str, value: JsonObject) -> None:
        """Write a file of JSON."""
        self._make(name.rpartition("/")[0])
        with open(self.path / name, "wb", opener=_open_private) as file:
            file.write(encode_json(value))

    def write_documents(self, documents: Sequence[Document]) -> None:
        """Write the files of documents."""
        for one in documents:
            self.write(document_path(one.key), one.to_json())

    def write_records(self, records: Sequence[CommitRecord], versions: Sequence[tuple[Key, DocumentVersion]]) -> None:
        """Append the events of records, and write versions of tasks."""
        events = [
            {"position": record.position, "time": record.time, "writer": record.writer, **_event(event)}
            for record in records
            for event in record.events
        ]
        self._append(b"".join(encode_json(event, is_indented=False) for event in events))
        for key, version in versions:
            self.write(version_path(key, version.version), version_view(key, version))

    def write_sessions(self, documents: Mapping[Key, Document]) -> None:
        """Write the owners of paths and the active sessions; a task without patterns may change any path."""
        owners = []
        for run, task, document in active_tasks(documents):
            attempt, hub = document.attempt, _value(documents, Key("run", run)).get("hub")
            owns = _value(documents, Key("spec", f"{run}/{task}")).get("owns", [])
            facts = {"run": run, "task": task, "status": document.status}
            owners.append({**facts, "attempt": attempt.number, "started": attempt.started, "owns": owns})
            slot = Worktree(Hub(Path(hub)), run, task, attempt.number).slot if isinstance(hub, str) else None
            session = report_session(run, task, document, None if slot is None else str(slot.tree))
            if session is not None:
                self.write(context_path(run, task), asdict(session))
        self.write("ownership.json", {"owners": owners})

    def install(self, path: Path) -> None:
        """Replace the folder at `path` with this one."""
        old = path.with_name(f"{path.name}.{token_hex(4)}.new")
        with suppress(FileNotFoundError):
            path.rename(old)
        self.path.rename(path)
        failpoint("views.replaced")
        shutil.rmtree(old, ignore_errors=True)

    def _append(self, data: bytes) -> None:
        with open(self.path / "events.jsonl", "a+b", opener=_open_private) as file:
            file.write(data)
            size = file.tell()
            if size > self._events_bytes:
                file.seek(size - self._events_bytes // 2)
                file.readline()
                rest = file.read()
                file.truncate(0)
                file.write(rest)

    def _make(self, folder: str) -> None:
        if folder not in self._made:
            self._make(folder.rpartition("/")[0])
            (self.path / folder).mkdir(mode=0o700)
            self._made.add(folder)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _remove_leftovers(path: Path) -> None:
    """Remove unfinished exports; refuse to replace anything but a folder."""
    for leftover in path.parent.glob(f"{path.name}.*.new"):
        shutil.rmtree(leftover, ignore_errors=True)
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
        raise RefusedError(f"{path} is not a folder", "remove it, so that the views can be written there")


#: Ids that are used unchanged: valid on case-insensitive file systems, and different from council's own file names.
_PLAIN: Final = re.compile(r"(?!.*\.json$)[a-z0-9][a-z0-9._-]{0,79}")
_ODD: Final = re.compile(r"[^A-Za-z0-9_-]")
_SHOWN: Final = 40  # characters of an encoded name
_DIGITS: Final = 16
#: The maximum depth of folders for an id; the rest is one name, which limits the length of paths.
_DEEPEST: Final = 4


def document_path(key: Key) -> str:
    """Return the file of a document, relative to the folder of the views."""
    match key.kind:
        case "run":
            return f"runs/{_path(key.id)}.json"
        case "task":
            return f"tasks/{_path(key.id)}/state.json"
        case "spec":
            return f"tasks/{_path(key.id)}/spec.json"
        case "checkpoint":
            return f"checkpoints/{_path(key.id)}.json"
        case kind:
            return f"documents/{_name(kind)}/{_path(key.id)}.json"


def version_path(key: Key, version: int) -> str:
    """Return the file of a task's version."""
    return f"tasks/{_path(key.id)}/history/v{version}.json"


def context_path(run: str, task: str) -> str:
    """Return the file of a task's session."""
    return f"context/{_path(f'{run}/{task}')}.json"


def _path(name: str) -> str:
    return "/".join(map(_name, name.split("/", _DEEPEST - 1)))


def _name(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{_ODD.sub('_', text[:_SHOWN])}~{digest[:_DIGITS]}"


def encode_json(value: Any, *, is_indented: bool = True) -> bytes:
    """Return JSON with a newline at its end."""
    indent = orjson.OPT_INDENT_2 if is_indented else 0
    try:
        return orjson.dumps(value, option=indent | orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # integers of more than 64 bits
        return json.dumps(value, indent=2 if is_indented else None, ensure_ascii=False).encode() + b"\n"


def version_view(key: Key, version: DocumentVersion) -> JsonObject:
    """Return the content of the file of a document's version."""
    return {
        "key": str(key),
        "version": version.version,
        "position": version.position,
        "time": version.time,
        "writer": version.writer,
        "events": [_event(one) for one in version.events],
        "deleted": version.value is None and not version.damaged,
        "damaged": version.damaged,
        "value": version.value,
    }


def _event(event: Event) -> JsonObject:
    return {"type": event.type, "data": event.data}


def active_tasks(documents: Mapping[Key, Document]) -> list[tuple[str, str, TaskDocument]]:
    """Return the readable tasks of unfinished runs between start and landing, by run and name, sorted by start."""
    active = []
    for document in documents.values():
        if document.key.kind != "task" or document.damaged:
            continue
        try:
            task = TaskDocument.model_validate_json(document.encoded)
        except ValidationError:
            continue
        run, _, name = document.key.id.partition("/")
        has_ended = _value(documents, Key("run", run)).get("ended") is not None
        if task.status in CLAIMED_STATUSES and task.attempts and not has_ended:
            active.append((run, name, task))
    return sorted(active, key=lambda one: (one[2].attempt.started, one[0], one[1]))


def _value(documents: Mapping[Key, Document], key: Key) -> JsonObject:
    """Return the value of a document; empty if it is missing."""
    return documents[key].value if key in documents else {}
