"""The topic `history`: recorded state, now and at earlier positions."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from fnmatch import fnmatchcase

from orchestrator.api.topic import Topic
from orchestrator.domain.wording import find_similar
from orchestrator.errors import HistoryCompacted, RefusedError
from orchestrator.protocols import VERSIONS_KEPT, CommitRecord, Document, DocumentVersion, Key, StateSnapshot
from orchestrator.state.documents.checkpoints import CHECKPOINT_KIND
from orchestrator.state.documents.log_reader import (
    find_position,
    follow_log,
    is_run_document,
    read_backwards,
    read_range,
)


def is_about_run(record: CommitRecord, run: str) -> bool:
    """Return True if a commit changed a document of a run, or recorded an event of it."""
    keys = (*record.documents, *record.unreadable)
    return any(is_run_document(key, run) for key in keys) or any(one.data.get("run") == run for one in record.events)


class StateHistory(Topic):
    """The state of a project at any log position, available as `council.history`.

    `run` is a run's id; the record of the run may have been removed.
    """

    async def position(self) -> int:
        """Return the position of the newest commit."""
        return await self._context.store.position()

    async def position_at(self, instant: float) -> int:
        """Return the position of the newest commit up to a time; 0 if all are later.

        The time is in wall-clock seconds. Raises RefusedError if the log does not go back that far.
        """
        return await find_position(self._context.store, instant)

    async def position_of(self, checkpoint: str) -> int | None:
        """Return the position of a checkpoint by id; None if there is none."""
        found = await self._context.store.get(Key(CHECKPOINT_KIND, checkpoint))
        return None if found is None else int(found.value["position"])

    async def at(self, position: int, *, run: str | None = None, names: Sequence[str] = ()) -> StateSnapshot:
        """Return the documents at a position: all, those of a run, or those in `names`.

        A name is `kind/id`, `kind/rest` for `kind/<run>/rest` (by default of the newest run), or either with `*` for
        any characters. Raises RefusedError if a name has no match, or if the log does not go back that far.
        """
        with _refuse_compacted():
            state = await self._context.store.at(position)
        documents = {key: one for key, one in state.documents.items() if run is None or is_run_document(key, run)}
        if names:
            home = run or await self._newest()
            keys = [key for name in names for key in _named(name, documents, home, f"at position {position}")]
            documents = {key: documents[key] for key in keys}
        return StateSnapshot(state.position, state.time, documents)

    async def key(self, name: str) -> Key:
        """Return the key for a name as in `at`, even of a deleted document.

        Raises RefusedError if there is none.
        """
        kind, _, rest = name.partition("/")
        exact, newest = Key(kind, rest), await self._newest()
        for key in (exact, *([Key(kind, f"{newest}/{rest}")] if newest else [])):
            if await self._context.store.history(key, 1):
                return key
        with _refuse_compacted():
            state = await self._context.store.at(await self.position())
        raise _unknown(name, state.documents, newest, "in the state")

    async def versions(self, key: Key, limit: int = VERSIONS_KEPT) -> Sequence[DocumentVersion]:
        """Return at most `limit` versions of a document in the log, newest first."""
        return await self._context.store.history(key, limit)

    async def commits(self, *, run: str | None = None, after: int = 0, until: int) -> AsyncGenerator[CommitRecord]:
        """Yield the commits after position `after` up to `until`, of a run or all.

        `after` 0 starts at the oldest one. Raises RefusedError if the log does not go back to `after`.
        """
        try:
            async with aclosing(read_range(self._context.store, after, until)) as records:
                async for record in records:
                    if run is None or is_about_run(record, run):
                        yield record
        except HistoryCompacted as gone:
            if after:
                raise _compacted_refusal(gone) from None
            start = gone.first
        else:
            return
        async with aclosing(self.commits(run=run, after=start, until=until)) as rest:
            async for record in rest:
                yield record

    def follow(self, after: int) -> AsyncGenerator[CommitRecord]:
        """Yield the commits of all runs after a log position, live; never ends on its own.

        Pruned commits are omitted.
        """
        return follow_log(self._context.followed_store, after)

    async def newest_commits(
        self, limit: int, *, run: str | None = None, after: int = 0, until: int
    ) -> Sequence[CommitRecord]:
        """Return the newest commits between two positions, at most `limit`, in log order."""
        found: deque[CommitRecord] = deque()
        with suppress(HistoryCompacted):
            async with aclosing(read_backwards(self._context.store, until, after)) as parts:
                async for part in parts:
                    for record in reversed(part):
                        if run is None or is_about_run(record, run):
                            found.appendleft(record)
                        if len(found) == limit:
                            return found
        return found

    async def _newest(self) -> str | None:
        with suppress(RefusedError):
            return await self._index.newest()
        return None


def _named(name: str, documents: Mapping[Key, Document], run: str | None, where: str) -> Sequence[Key]:
    kind, _, rest = name.partition("/")
    exact, short = Key(kind, rest), Key(kind, f"{run}/{rest}")
    for key in (exact, short):
        if key in documents:
            return [key]
        if "*" in name and (found := [one for one in documents if fnmatchcase(str(one), str(key))]):
            return sorted(found)
    raise _unknown(name, documents, run, where)


def _unknown(name: str, keys: Collection[Key], run: str | None, where: str) -> RefusedError:
    """Return the error for a name that matches no document."""
    short = {str(key).replace(f"/{run}/", "/", 1): str(key) for key in keys} if run else {}
    names = [*short, *(full for full in map(str, keys) if full not in short)]
    folded = name.casefold()  # the name in a different case, or without its kind, is a match
    near = [one for one in names if folded in {one.casefold(), one.casefold().partition("/")[2]}]
    near = near or find_similar(name, names, 3)
    remedy = f"did you mean {' or '.join(near)}?" if near else "`council state at now` lists the documents"
    if "/" not in name and not near:
        remedy = f"write kind/id, such as task/models: {remedy}"
    return RefusedError(f"there is no document {name!r} {where}", remedy)


@contextmanager
def _refuse_compacted() -> Iterator[None]:
    """Convert HistoryCompacted into a RefusedError that names the oldest position."""
    try:
        yield
    except HistoryCompacted as gone:
        raise _compacted_refusal(gone) from None


def _compacted_refusal(gone: HistoryCompacted) -> RefusedError:
    message = f"the state log does not go back to position {gone.position}, only to {gone.first}"
    return RefusedError(message, f"use position {gone.first} or later, or a later time")
