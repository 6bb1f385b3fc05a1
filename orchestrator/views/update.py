"""Brings the views up to date with the store, from where they stand or from nothing."""

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

#: The kinds of documents that there are; others are known once they are written.
DOCUMENT_KINDS: Final = (
    *("run", "spec", "task", "lease", "adapter", "cursor", "request", "conflict", "checkpoint", "ports"),
    *("claim", "orchestrator", "ownership", "context", "note", "handoff", "shared"),
)
#: Records, and documents, that are dealt with at once: no more of the log is ever held.
_PART: Final = 256
#: Seconds in which whoever else writes the views is to have come far enough, and between two looks whether it has.
_LOCK_TIMEOUT: Final = 30.0
_LOCK_INTERVAL: Final = 0.1
#: Seconds for the versions of tasks that the log does not go back to: each is looked up by itself.
_HISTORY_LIMIT: Final = 15.0
#: How often all is begun again because the log was thinned out meanwhile.
_TRIES: Final = 3


class Views:
    """The views of a project's store. One process at a time writes them: who holds `lock`."""

    def __init__(self, store: Store, clock: Clock, project: Project) -> None:
        self.lock = FileLock(project.views_lock)
        self._store, self._clock = store, clock
        self._folder = ViewFolder(project.views)
        self._tail: LogTail | None = None
        self._stand = ViewPosition()
        self._stamp: tuple[int, int, int] | None = None
        self._sessions = ActiveSessions()
        self._is_new = False
        """Whether there is something to write although nothing has been committed."""

    @property
    def path(self) -> Path:
        """Where they are."""
        return self._folder.path

    async def refresh(self, *, rebuild: bool = False) -> ViewPosition:
        """Update the views, or rebuild them from scratch; wait for another process that is updating them.

        Raises LockHeld if that takes too long.
        """
        goal, deadline = await self._store.position(), anyio.current_time() + _LOCK_TIMEOUT
        has_asked = False
        while True:
            try:
                async with self.lock.hold(0):
                    try:
                        return await self.update(rebuild=rebuild)
                    finally:
                        await self.close()
            except LockHeld:
                if rebuild and not has_asked:  # the writing process starts from scratch if this file is missing
                    await _in_thread(self._folder.remove_index)
                    has_asked = True
                stand = await _in_thread(self._folder.read_position)
                if stand is not None and stand.position >= goal:
                    return stand
                if anyio.current_time() > deadline:
                    raise
            await anyio.sleep(_LOCK_INTERVAL)

    async def update(self, *, rebuild: bool = False) -> ViewPosition:
        """Bring them up to date; the caller holds the lock, and calls `close` in the end.

        Raises OSError where they can't be written, and what the store raises.
        """
        try:
            for _ in range(_TRIES):
                with suppress(HistoryCompacted):
                    return await self._update(rebuild=rebuild)
                await self.close()
            return await self._update(rebuild=True)
        except BaseException:  # what was read and not written must be read again
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
        if rebuild or self._tail is None or not is_ours or self._stand.damage != self._damage():
            await self.close()
            self._tail = await self._begin(rebuild=rebuild)
        return await self._follow(self._tail)

    async def _begin(self, *, rebuild: bool) -> LogTail:
        """Return the log from where the views stand, which is the beginning if they can't be gone on with."""
        await _in_thread(self._folder.begin)
        stand = None if rebuild else await _in_thread(self._folder.read_position)
        tail = None if stand is None else await self._tail_behind(stand)
        if stand is None or tail is None:
            tail = await self._rebuild()
        else:
            self._stand = stand
            await _in_thread(partial(self._folder.resume, stand))
        self._sessions, self._is_new = ActiveSessions(), True
        for run in await _in_thread(partial(_unfinished, await self._store.list("run"))):
            for part in _parts(await self._store.list("task", f"{run}/")):
                await self._write(self._folder, (), {}, tasks={one.key: one for one in part})
        return tail

    async def _tail_behind(self, stand: ViewPosition) -> LogTail | None:
        """Return the log behind a stand; None where the views are not what they were when it was written down."""
        if stand.damage != self._damage() or stand.position > await self._store.position():
            return None
        documents = [
            one for kind in DOCUMENT_KINDS for one in await self._store.list(kind) if one.position <= stand.position
        ]
        if not await _in_thread(lambda: self._folder.is_whole(_names(documents), stand)):
            return None
        tail = LogTail(self._store, max(stand.position - 1, 0))
        try:
            for record in await tail.part(stand.position, 1):
                if (record.position, record.time, record.by) == (stand.position, stand.time, stand.by):
                    return tail
        except HistoryCompacted:
            pass
        if stand.position == 0:
            return tail
        await tail.close()
        return None

    async def _rebuild(self) -> LogTail:
        """Rebuild the folder, and return the log after its position."""
        self._stand = ViewPosition()
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
            self._stand = _position_of(records[-1])
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
        """Write the versions of tasks that the log does not tell, of those first that changed last."""
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
            self._stand, self._is_new = _position_of(records[-1]), True
            tasks = {key: one for key, one in documents.items() if key.kind == "task"}
            await self._write(self._folder, records, documents, tasks)
        if self._is_new or self._sessions.has_missing_worktree:
            await _in_thread(self._conclude)
        return self._stand

    async def _write(
        self,
        folder: ViewFolder,
        records: Sequence[CommitRecord],
        documents: Mapping[Key, Document | None],
        tasks: Mapping[Key, Document | None],
    ) -> None:
        """Write a part of the log with the documents that it changed, and remember which `tasks` are at work."""
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
        """Write what is told of sessions, then how far the views are. Blocks."""
        self._folder.apply(self._sessions.changes())
        if self._is_new:
            one, now = self._stand, self._clock.now()
            events = self._folder.events_size()
            self._stand = ViewPosition(one.position, one.time, one.by, now, events, self._damage())
            self._folder.conclude(self._stand)
            self._stamp, self._is_new = self._folder.index_stamp(), False

    def _damage(self) -> tuple[str, ...]:
        return tuple(one.describe() for one in self._store.damage)


def _apply(folder: ViewFolder, decide: Callable[[], ViewChanges]) -> None:
    folder.apply(decide())


def _position_of(record: CommitRecord) -> ViewPosition:
    return ViewPosition(record.position, record.time, record.by)


def _names(documents: Sequence[Document]) -> Iterator[str]:
    """Yield the files that must be there if documents are."""
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
