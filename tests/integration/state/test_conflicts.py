"""Concurrent updates of documents: resolved at once, or kept for a person to decide."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest

from orchestrator.domain.documents.conflicts import ConflictStrategy, DocumentUpdate
from orchestrator.errors import InvalidDocument, RefusedError, VersionConflict
from orchestrator.protocols import Commit, CommitRecord, Event, JsonObject, Key, Store, Write
from orchestrator.state.documents import update as retrying
from orchestrator.state.documents.conflicts import (
    CONFLICT_KIND,
    Conflict,
    apply_updates,
    list_pending,
    resolve_conflict,
)
from orchestrator.state.stores.file import FileStore
from orchestrator.testing.clock import ManualClock
from tests.store_kinds import ALL_KINDS, open_kind

A, B = Key("task", "r/a"), Key("task", "r/b")


@pytest.fixture
def clock() -> ManualClock:
    """The store's clock."""
    return ManualClock()


@pytest.fixture(params=ALL_KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
    """An empty store of each kind."""
    async with open_kind(request.param, tmp_path, clock) as opened:
        yield opened


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make retries wait only briefly."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 1e-4)


def ada(key: Key, value: JsonObject | None, base: int | None = None) -> DocumentUpdate[Key]:
    """The earlier update."""
    return DocumentUpdate(key, 1.0, "ada", value, base)


def bob(key: Key, value: JsonObject | None, base: int | None = None) -> DocumentUpdate[Key]:
    """The later update."""
    return DocumentUpdate(key, 2.0, "bob", value, base)


async def put(store: Store, key: Key, value: JsonObject | None) -> None:
    """Write a document, regardless of its version."""
    found = await store.get(key)
    await store.commit(Commit([Write(key, found.version if found else 0, value)]))


async def value_of(store: Store, key: Key) -> JsonObject | None:
    """Return a document's value."""
    found = await store.get(key)
    return found.value if found else None


async def record_at(store: Store, position: int) -> CommitRecord:
    """Return the record of a commit."""
    async with aclosing(store.watch(position - 1)) as records:
        return await anext(records)


async def leave_to_person(store: Store, *updates: DocumentUpdate[Key]) -> Conflict:
    """Leave all conflicts to a person."""
    (conflict,) = (await apply_updates(store, updates, "manual")).waiting
    return conflict


class Overtaken:
    """A store with a concurrent write right before each of the first commits."""

    def __init__(self, store: Store, interfere: Callable[[], Awaitable[object]], times: int) -> None:
        self._commit, self._interfere, self._times = store.commit, interfere, times
        self.get, self.list, self.history = store.get, store.list, store.history
        self.tried = 0

    async def commit(self, mine: Commit) -> int:
        """Commit after the concurrent write."""
        self.tried += 1
        if self.tried <= self._times:
            await self._interfere()
        return await self._commit(mine)


def overtaken(store: Store, interfere: Callable[[], Awaitable[object]], times: int = 1) -> Any:
    """Return such a store; typed as Any, because it has only the methods that are used."""
    return Overtaken(store, interfere, times)


@pytest.mark.parametrize(
    ("strategy", "value"),
    [
        (ConflictStrategy.LAST_WRITE_WINS, {"n": 2, "tags": ["b"]}),
        (ConflictStrategy.FIRST_WRITE_WINS, {"n": 1, "tags": ["a"]}),
        (ConflictStrategy.MERGE, {"n": 1, "tags": ["a", "b"]}),
    ],
)
async def test_batch_is_resolved_in_one_commit(store: Store, strategy: ConflictStrategy, value: JsonObject) -> None:
    """One commit for several documents, with an event only for a document with more than one update."""
    await put(store, A, {"n": 0})
    updates = [bob(A, {"n": 2, "tags": ["b"]}), ada(B, {"n": 5}), ada(A, {"n": 1, "tags": ["a"]})]
    applied = await apply_updates(store, updates, strategy)
    assert (set(applied.written), list(applied.resolved), list(applied.waiting)) == ({A, B}, [A], [])
    assert (await store.position(), await value_of(store, A), await value_of(store, B)) == (2, value, {"n": 5})
    facts = {"key": "task/r/a", "strategy": strategy.value, "writers": ["ada", "bob"]}
    assert list((await record_at(store, 2)).events) == [Event("state.conflict_auto_resolved", facts)]


async def test_last_write_wins_by_default(store: Store) -> None:
    """An unknown strategy is rejected before anything is written."""
    await apply_updates(store, [bob(A, {"n": 2}), ada(A, {"n": 1})])
    assert await value_of(store, A) == {"n": 2}
    with pytest.raises(RefusedError, match="last_write_wins, first_write_wins, merge, manual"):
        await apply_updates(store, [ada(A, {"n": 3})], "newest")
    assert await store.position() == 1


async def test_deletion_is_an_update(store: Store) -> None:
    """Deleting a missing document does nothing, and no updates mean no commit."""
    await put(store, A, {"n": 0})
    await apply_updates(store, [ada(A, {"n": 1}), bob(A, None)])
    assert (await store.position(), await value_of(store, A)) == (2, None)
    await apply_updates(store, [ada(A, None)])
    await apply_updates(store, [])
    assert await store.position() == 2


async def test_invalid_update_fails_its_batch_only(store: Store) -> None:
    """Nothing of a batch with an unstorable value is written."""
    with pytest.raises(InvalidDocument):
        await apply_updates(store, [ada(A, {"n": 1}), ada(B, {"n": float("nan")})])
    assert await store.position() == 0
    await apply_updates(store, [ada(A, {"n": 1})])
    assert await value_of(store, A) == {"n": 1}


async def test_overtaken_batch_is_repeated(store: Store) -> None:
    """The whole batch, a limited number of times; then the conflict is reported, and nothing is written."""
    slow = overtaken(store, lambda: put(store, B, {"theirs": 1}), 2)
    await apply_updates(slow, [ada(A, {"n": 1}), ada(B, {"n": 1})])
    assert (slow.tried, await store.position()) == (3, 3)
    assert (await value_of(store, A), await value_of(store, B)) == ({"n": 1}, {"n": 1})
    slow = overtaken(store, lambda: put(store, B, {"theirs": 2}), 9)
    with pytest.raises(VersionConflict):
        await apply_updates(slow, [ada(A, {"n": 2}), ada(B, {"n": 2})])
    assert slow.tried == retrying.MAX_ATTEMPTS
    assert (await value_of(store, A), await value_of(store, B)) == ({"n": 1}, {"theirs": 2})


async def test_concurrent_batches_are_complete(store: Store) -> None:
    """Both documents of a batch always have the same writer."""

    async def write(number: int) -> None:
        value = {"n": number}
        await apply_updates(store, [DocumentUpdate(key, number, "w", value) for key in (A, B)])

    async with anyio.create_task_group() as group:
        for number in range(retrying.MAX_ATTEMPTS):  # each attempt of all lets one of them succeed
            group.start_soon(write, number)
    assert await store.position() == retrying.MAX_ATTEMPTS
    for position in range(1, retrying.MAX_ATTEMPTS + 1):
        documents = (await record_at(store, position)).documents
        assert documents[A] == documents[B]


async def test_update_of_an_older_version_competes(store: Store, clock: ManualClock) -> None:
    """It has the time and author of its commit; an update by a writer that read it, or read nothing, replaces it."""
    await put(store, A, {"base": 0})
    clock.advance(5)
    await put(store, A, {"theirs": 1})
    found = await store.get(A)
    assert found is not None
    early, late = (DocumentUpdate(A, clock.now() + distance, "ada", {"mine": 1}, 1) for distance in (-1, 1))
    applied = await apply_updates(store, [early])
    assert (list(applied.resolved), await value_of(store, A)) == ([A], {"theirs": 1})
    assert (await record_at(store, 3)).events[0].data["writers"] == ["ada", found.writer]
    await apply_updates(store, [late], "merge")
    assert await value_of(store, A) == {"theirs": 1, "mine": 1}
    applied = await apply_updates(store, [ada(A, {"mine": 2}, 4)])
    assert (list(applied.resolved), await value_of(store, A)) == ([], {"mine": 2})
    assert list((await apply_updates(store, [ada(A, {"mine": 3})])).resolved) == []


async def test_deletion_of_an_unknown_version_competes(store: Store) -> None:
    """It is a candidate like any other; not if the writer read that the document is missing."""
    await put(store, A, {"base": 0})
    await put(store, A, None)
    conflict = await leave_to_person(store, DocumentUpdate(A, 2e9, "ada", {"mine": 1}, 1))
    assert [(one.value, one.base) for one in conflict.candidates] == [(None, None), ({"mine": 1}, 1)]
    assert await list_pending(store) == [conflict]
    assert list((await apply_updates(store, [ada(A, {"mine": 1}, 0)])).resolved) == []


async def test_expired_document_does_not_compete(store: Store, clock: ManualClock) -> None:
    """It counts as never written."""
    await put(store, A, {"base": 0})
    await store.commit(Commit([Write(A, 1, {"theirs": 1}, ttl=5)]))
    clock.advance(6)
    assert list((await apply_updates(store, [ada(A, {"mine": 1}, 1)])).resolved) == []
    assert await value_of(store, A) == {"mine": 1}


async def test_conflict_during_the_write_is_detected(store: Store) -> None:
    """An overtaken writer reads the candidates again."""
    await put(store, A, {"base": 0})
    slow = overtaken(store, lambda: put(store, A, {"theirs": 1}))
    assert list((await apply_updates(slow, [DocumentUpdate(A, 2e9, "ada", {"mine": 1}, 1)], "merge")).resolved) == [A]
    assert await value_of(store, A) == {"theirs": 1, "mine": 1}


async def test_manual_conflict_is_recorded_and_reported(store: Store) -> None:
    """The document stays as it is, the rest of the batch is written, and the conflict is listed with all candidates."""
    await put(store, A, {"n": 0})
    applied = await apply_updates(store, [bob(A, {"n": 2}), ada(A, None), ada(B, {"n": 5})], "manual")
    (conflict,) = applied.waiting
    assert (list(applied.written), list(applied.resolved)) == ([B], [])
    assert (conflict.key, conflict.version) == (A, 1)
    assert list(conflict.candidates) == [ada(A, None), bob(A, {"n": 2})]
    assert await list_pending(store) == [conflict]
    assert (await value_of(store, A), await value_of(store, B), await store.position()) == ({"n": 0}, {"n": 5}, 2)
    facts = {"key": "task/r/a", "writers": ["ada", "bob"], "conflict": conflict.id}
    assert list((await record_at(store, 2)).events) == [Event("state.conflict_recorded", facts)]


async def test_concurrent_conflicts_are_all_recorded(store: Store) -> None:
    """Each under an id of its own, the oldest listed first."""
    found: list[Conflict] = []

    async def leave() -> None:
        found.append(await leave_to_person(store, ada(A, {"n": 1}), bob(A, {"n": 2})))

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(leave)
    listed = await list_pending(store)
    assert {one.id for one in listed} == {one.id for one in found}
    positions = [document.position for one in listed if (document := await store.get(Key(CONFLICT_KIND, one.id)))]
    assert positions == list(range(1, 11))


async def test_conflict_id_is_unique(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two processes draw the same id, the second draws another."""
    given = iter(["same", "same", "other"])
    monkeypatch.setattr("orchestrator.state.documents.conflicts.secrets.token_hex", lambda _: next(given))
    assert [(await leave_to_person(store, ada(key, {}), bob(key, {}))).id for key in (A, B)] == ["same", "other"]
    assert [one.key for one in await list_pending(store)] == [A, B]


@pytest.mark.parametrize(
    ("choice", "value", "writer"), [(1, {"n": 1}, "ada"), (2, None, "bob"), ({"n": 9}, {"n": 9}, None)]
)
async def test_chosen_update_is_written_and_resolves_the_conflict(
    store: Store, choice: int | JsonObject, value: JsonObject | None, writer: str | None
) -> None:
    """One commit with an event that names the candidate's author, or the person of an own value; it may delete."""
    await put(store, A, {"n": 0})
    conflict = await leave_to_person(store, bob(A, None), ada(A, {"n": 1}))
    written = await resolve_conflict(store, conflict.id, choice)
    assert (written.value if written else None, await value_of(store, A)) == (value, value)
    assert (await list_pending(store), await store.position()) == ([], 3)
    facts = {"key": "task/r/a", "conflict": conflict.id, "writer": writer}
    assert list((await record_at(store, 3)).events) == [Event("state.conflict_resolved", facts)]


async def test_unknown_conflict_can_not_be_resolved(store: Store) -> None:
    """The error lists the open conflicts, or the number of candidates; nothing is written."""
    with pytest.raises(RefusedError) as caught:
        await resolve_conflict(store, "nope", 1)
    assert str(caught.value) == "no pending conflict 'nope': there are none"
    conflict = await leave_to_person(store, ada(A, {"n": 1}), bob(A, {"n": 2}))
    with pytest.raises(RefusedError, match=f"pending conflicts: {conflict.id}$"):
        await resolve_conflict(store, "nope", 1)
    for number in (0, 3, -1):
        with pytest.raises(RefusedError, match="choose one of 1 to 2, or set a value"):
            await resolve_conflict(store, conflict.id, number)
    assert await store.position() == 1
    await resolve_conflict(store, conflict.id, 2)
    with pytest.raises(RefusedError, match=r"there are none$"):
        await resolve_conflict(store, conflict.id, 1)
    assert await value_of(store, A) == {"n": 2}


async def test_changed_document_is_not_overwritten(store: Store) -> None:
    """The error has author and time; forced, the choice replaces the document."""
    conflict = await leave_to_person(store, ada(A, {"n": 1}), bob(A, {"n": 2}))
    await put(store, A, {"n": 3})
    found = await store.get(A)
    assert found is not None
    with pytest.raises(RefusedError) as caught:
        await resolve_conflict(store, conflict.id, 1)
    assert caught.value.message == (
        f"task/r/a was changed by {found.writer}, 2001-09-09 01:46:40 UTC, after conflict {conflict.id!r} was found"
    )
    assert "force" in caught.value.remedy
    assert (await value_of(store, A), await list_pending(store)) == ({"n": 3}, [conflict])
    await resolve_conflict(store, conflict.id, 1, force=True)
    assert (await value_of(store, A), await list_pending(store)) == ({"n": 1}, [])


async def test_deleted_document_is_not_recreated(store: Store, clock: ManualClock) -> None:
    """The error has author and time of the deletion, or says that it expired."""
    await put(store, A, {"n": 0})
    await store.commit(Commit([Write(B, 0, {"n": 0}, ttl=5)]))
    first, second = [await leave_to_person(store, ada(key, {"n": 1}), bob(key, {"n": 2})) for key in (A, B)]
    await put(store, A, None)
    clock.advance(6)
    with pytest.raises(RefusedError, match=r"task/r/a was deleted by .*, 2001-09-09 01:46:40 UTC"):
        await resolve_conflict(store, first.id, 1)
    with pytest.raises(RefusedError, match="task/r/b no longer exists, after"):
        await resolve_conflict(store, second.id, 1)
    for conflict in (first, second):
        await resolve_conflict(store, conflict.id, 1, force=True)
    assert (await value_of(store, A), await value_of(store, B)) == ({"n": 1}, {"n": 1})


async def test_change_at_the_last_moment_is_detected(store: Store) -> None:
    """A write between the read and the commit is reported as well, or overwritten if forced."""
    conflict = await leave_to_person(store, ada(A, {"n": 1}), bob(A, {"n": 2}))
    with pytest.raises(RefusedError, match="was changed by"):
        await resolve_conflict(overtaken(store, lambda: put(store, A, {"n": 3})), conflict.id, 1)
    await resolve_conflict(overtaken(store, lambda: put(store, A, {"n": 4})), conflict.id, 1, force=True)
    assert await value_of(store, A) == {"n": 1}


async def test_conflict_is_resolved_once(store: Store) -> None:
    """The second person gets an error that the conflict is resolved."""
    conflict = await leave_to_person(store, ada(A, {"n": 1}), bob(A, {"n": 2}))
    with pytest.raises(RefusedError, match=r"there are none$"):
        await resolve_conflict(
            overtaken(store, lambda: resolve_conflict(store, conflict.id, 2)), conflict.id, 1, force=True
        )
    assert await value_of(store, A) == {"n": 2}


async def test_conflict_survives_its_process(tmp_path: Path, clock: ManualClock) -> None:
    """The next process finds it, with every candidate."""
    async with FileStore.open(tmp_path, clock) as store:
        conflict = await leave_to_person(store, ada(A, {"n": 1}), bob(A, {"n": 2}))
    async with FileStore.open(tmp_path, clock) as store:
        assert await list_pending(store) == [conflict]
        await resolve_conflict(store, conflict.id, 2)
        assert await value_of(store, A) == {"n": 2}


async def test_damaged_conflict_is_ignored(tmp_path: Path, clock: ManualClock) -> None:
    """It is not listed, and can't be resolved; others can."""
    async with FileStore.open(tmp_path, clock) as store:
        lost = await leave_to_person(store, ada(A, {"n": "damaged"}), bob(A, {"n": 2}))
        other = await leave_to_person(store, ada(B, {"n": 1}), bob(B, {"n": 2}))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"damaged", b"demaged"))
    async with FileStore.open(tmp_path, clock) as store:
        assert await list_pending(store) == [other]
        with pytest.raises(RefusedError, match="is damaged: `council state verify`"):
            await resolve_conflict(store, lost.id, 1)
        await resolve_conflict(store, other.id, 1)
        assert (await value_of(store, A), await value_of(store, B)) == (None, {"n": 1})
