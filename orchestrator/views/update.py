"""Update the views from the store, from their position or from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import anyio
import anyio.to_thread

from orchestrator.errors import HistoryCompacted, LockHeld
from orchestrator.project import Project
from orchestrator.protocols import CommitRecord, Document, Key, Store
from orchestrator.state.documents.log_reader import LogTail
from orchestrator.system.clock import Clock
from orchestrator.system.file_lock import FileLock
from orchestrator.views.content import ViewChanges, ViewPosition, document_changes, history_changes, log_changes
from orchestrator.views.folder import ViewFolder
from orchestrator.views.names import document_path, version_path
from orchestrator.views.sessions import ActiveSessions

T = TypeVar("T")

#: The kinds of documents to list; others become known when they are written.
DOCUMENT_KINDS: Final = (
    *("run", "spec", "task", "lease", "adapter", "cursor", "request", "conflict", "checkpoint", "ports"),
    *("claim", "orchestrator", "ownership", "context", "note", "handoff", "shared"),
)
#: The number of records or documents that are processed at once, which limits the memory.
_PART: Final = 256
#: Seconds to wait for another process to update the views, and between two checks.
_LOCK_TIMEOUT: Final = 30.0
_LOCK_INTERVAL: Final = 0.1
#: Seconds to write versions of tasks that are older than the log: each is looked up individually.
_HISTORY_LIMIT: Final = 15.0
#: The attempts of an update if the log is pruned meanwhile.
_ATTEMPTS: Final = 3


class Views:
    """The views of a project's store. Only the process that holds `lock` writes them."""

    def __init__(self, store: Store, clock: Clock, project: Project) -> None:
        self.lock = FileLock(project.views_lock)
        self._store, self._clock = store, clock
        self._folder = ViewFolder(project.views)
        self._tail: LogTail | None = None
        self._position = ViewPosition()
        self._stamp: tuple[int, int, int] | None = None
        self._sessions = ActiveSessions()
        self._is_new = False
        """Whether the index has to be written even without a new commit."""

    @property
    def path(self) -> Path:
        """The folder of the views."""
        return self._folder.path

    async def refresh(self, *, rebuild: bool = False) -> ViewPosition:
        """Update the views, or rebuild them from scratch; wait for another process that is updating them.

        Raises LockHeld if that takes too long.
        """
        goal, deadline = await self._store.position(), anyio.current_time() + _LOCK_TIMEOUT
        has_requested = False
        while True:
            try:
                async with self.lock.hold(0):
                    try:
                        return await self.update(rebuild=rebuild)
                    finally:
                        await self.close()
            except LockHeld:
                if rebuild and not has_requested:  # the writing process starts from scratch if this file is missing
                    await _in_thread(self._folder.remove_index)
                    has_requested = True
                position = await _in_thread(self._folder.read_position)
                if position is not None and position.position >= goal:
                    return position
                if anyio.current_time() > deadline:
                    raise
            await anyio.sleep(_LOCK_INTERVAL)

    async def update(self, *, rebuild: bool = False) -> ViewPosition:
        """Update the views; the caller holds the lock, and calls `close` at the end.

        Raises OSError if they can't be written, and errors of the store.
        """
        try:
            for _ in range(_ATTEMPTS):
                with suppress(HistoryCompacted):
                    return await self._update(rebuild=rebuild)
                await self.close()
            return await self._update(rebuild=True)
        except BaseException:  # records that were read but not written must be read again
            with anyio.CancelScope(shield=True):
                await self.close()
            raise

    async def close(self) -> None:
        """Stop following the log; the next update reads the position of the views again."""
        tail, self._tail = self._tail, None
        if tail is not None:
            await tail.close()

    async def _update(self, *, rebuild: bool) -> ViewPosition:
        is_ours = self._stamp is not None and self._stamp == await _in_thread(self._folder.index_stamp)
        if rebuild or self._tail is None or not is_ours or self._position.damage != self._damage():
            await self.close()
            self._tail = await self._begin(rebuild=rebuild)
        return await self._follow(self._tail)

    async def _begin(self, *, rebuild: bool) -> LogTail:
        """Return the log from the views' position; rebuild them if they can't be continued."""
        await _in_thread(self._folder.begin)
        position = None if rebuild else await _in_thread(self._folder.read_position)
        tail = None if position is None else await self._tail_behind(position)
        if position is None or tail is None:
            tail = await self._rebuild()
        else:
            self._position = position
            await _in_thread(partial(self._folder.resume, position))
        self._sessions, self._is_new = ActiveSessions(), True
        for run in await _in_thread(partial(_unfinished, await self._store.list("run"))):
            for part in _parts(await self._store.list("task", f"{run}/")):
                await self._write(self._folder, (), {}, tasks={one.key: one for one in part})
        return tail

    async def _tail_behind(self, position: ViewPosition) -> LogTail | None:
        """Return the log after a position; None if the views were changed since it was written."""
        if position.damage != self._damage() or position.position > await self._store.position():
            return None
        documents = [
            one for kind in DOCUMENT_KINDS for one in await self._store.list(kind) if one.position <= position.position
        ]
        if not await _in_thread(lambda: self._folder.is_whole(_names(documents), position)):
            return None
        tail = LogTail(self._store, max(position.position - 1, 0))
        try:
            for record in await tail.part(position.position, 1):
                if (record.position, record.time, record.by) == (position.position, position.time, position.by):
                    return tail
        except HistoryCompacted:
            pass
        if position.position == 0:
            return tail
        await tail.close()
        return None

    async def _rebuild(self) -> LogTail:
        """Rebuild the folder, and return the log after its position."""
        self._position = ViewPosition()
        folder = await _in_thread(self._folder.create_replacement)
        try:
            tail = await self._write_log(folder)
            await _in_thread(partial(self._folder.replace_with, folder))
        except Exception:
            await _in_thread(folder.remove)
            raise
        return tail

    async def _write_log(self, folder: ViewFolder) -> LogTail:
        until, is_whole, kinds = await self._store.position(), not self._store.damage, set(DOCUMENT_KINDS)
        newest = {one.key: one.version for one in await self._store.list("task")}
        tail = LogTail(self._store, 0)
        try:
            records = await tail.part(until, _PART)
        except HistoryCompacted as gone:
            tail, is_whole = LogTail(self._store, gone.first), False
            records = await tail.part(until, _PART)
        while records:
            kinds.update(key.kind for record in records for key in record.documents)
            self._position = _to_position(records[-1])
            await _in_thread(partial(_apply, folder, partial(log_changes, records, newest)))
            records = await tail.part(until, _PART)
        if not is_whole:
            await self._write_histories(folder)
        for kind in sorted(kinds):
            for part in _parts(await self._store.list(kind)):
                found = {one.key: one for one in part}
                await _in_thread(partial(_apply, folder, partial(document_changes, found)))
        return tail

    async def _write_histories(self, folder: ViewFolder) -> None:
        """Write the versions of tasks that are older than the log, recently changed tasks first."""
        tasks = sorted(await self._store.list("task"), key=lambda one: one.position, reverse=True)
        with anyio.move_on_after(_HISTORY_LIMIT):
            for one in tasks:
                versions = await self._store.history(one.key)
                await _in_thread(partial(_apply, folder, partial(history_changes, one.key, versions)))

    async def _follow(self, tail: LogTail) -> ViewPosition:
        until = await self._store.position()
        while records := await tail.part(until, _PART):
            keys = dict.fromkeys(key for record in records for key in (*record.documents, *record.unreadable))
            documents = {key: await self._store.get(key) for key in keys}
            self._position, self._is_new = _to_position(records[-1]), True
            tasks = {key: one for key, one in documents.items() if key.kind == "task"}
            await self._write(self._folder, records, documents, tasks)
        if self._is_new or self._sessions.has_missing_worktree:
            await _in_thread(self._conclude)
        return self._position

    async def _write(
        self,
        folder: ViewFolder,
        records: Sequence[CommitRecord],
        documents: Mapping[Key, Document | None],
        tasks: Mapping[Key, Document | None],
    ) -> None:
        """Write a part of the log with its changed documents, and update the active tasks from `tasks`."""
        specs = {key: await self._store.get(Key("spec", key.id)) for key in tasks}
        new_runs = {run for key in tasks if (run := key.id.partition("/")[0]) not in self._sessions.hubs}
        runs = {run: await self._store.get(Key("run", run)) for run in new_runs}

        def write() -> None:
            for run, document in runs.items():
                self._sessions.set_run(run, document)
            self._sessions.take(tasks, specs)
            newest = {key: one.version for key, one in documents.items() if one is not None}
            folder.apply(log_changes(records, newest))
            folder.apply(document_changes(documents))

        await _in_thread(write)

    def _conclude(self) -> None:
        """Write the files of sessions, then the position. Blocks."""
        self._folder.apply(self._sessions.changes())
        if self._is_new:
            one, now = self._position, self._clock.now()
            events = self._folder.events_size()
            self._position = ViewPosition(one.position, one.time, one.by, now, events, self._damage())
            self._folder.conclude(self._position)
            self._stamp, self._is_new = self._folder.index_stamp(), False

    def _damage(self) -> tuple[str, ...]:
        return tuple(one.describe() for one in self._store.damage)


def _apply(folder: ViewFolder, decide: Callable[[], ViewChanges]) -> None:
    folder.apply(decide())


def _to_position(record: CommitRecord) -> ViewPosition:
    return ViewPosition(record.position, record.time, record.by)


def _names(documents: Sequence[Document]) -> Iterator[str]:
    """Yield the files that must exist for documents."""
    for one in documents:
        yield document_path(one.key)
        if one.key.kind == "task" and not one.damaged:
            yield version_path(one.key, one.version)


def _unfinished(runs: Sequence[Document]) -> list[str]:
    return [one.key.id for one in runs if one.damaged or one.value.get("ended") is None]


def _parts(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
    for start in range(0, len(documents), _PART):
        yield documents[start : start + _PART]


async def _in_thread(call: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(call)
