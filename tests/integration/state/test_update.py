"""Updates of documents with concurrent writers, and subscriptions to changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest

from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, JsonObject, Key, Store, Write
from orchestrator.state.documents import update as module
from orchestrator.state.documents.log_reader import DocumentChange, subscribe
from orchestrator.state.documents.update import update_document
from orchestrator.system.clock import SystemClock
from tests.store_kinds import ALL_KINDS, open_kind

COUNT = Key("count", "r/a")


@pytest.fixture(params=ALL_KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Yield an empty store of each kind."""
    async with open_kind(request.param, tmp_path, SystemClock()) as opened:
        yield opened


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses between tries."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 1e-4)


def increment(value: JsonObject | None) -> JsonObject:
    """Increment the number."""
    return {"n": (value or {"n": 0})["n"] + 1}


async def test_concurrent_updates_lose_nothing(store: Store) -> None:
    """An overtaken update is repeated with the newer value."""

    async def count() -> None:
        for _ in range(5):
            await update_document(store, COUNT, increment, attempts=1_000)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(count)
    found = await store.get(COUNT)
    assert found is not None
    assert (found.value, found.version) == ({"n": 40}, 40)


async def test_repeatedly_overtaken_update_gives_up(store: Store) -> None:
    """After the last try the conflict is raised, and nothing is written."""
    tried = 0

    def overtaken(value: JsonObject | None) -> JsonObject:
        nonlocal tried
        tried += 1
        return {"mine": value}

    commit = store.commit

    class Rival:
        """Writes the document between each read and the write that follows it."""

        get = staticmethod(store.get)

        @staticmethod
        async def commit(mine: Commit) -> int:
            found = await store.get(COUNT)
            await commit(Commit([Write(COUNT, found.version if found else 0, {"theirs": tried})]))
            return await commit(mine)

    with pytest.raises(VersionConflict):
        await update_document(Rival(), COUNT, overtaken, attempts=3)  # type: ignore[arg-type]  # the used methods of a store
    assert tried == 3
    found = await store.get(COUNT)
    assert found is not None
    assert found.value == {"theirs": 3}


async def test_expected_version_is_tried_once(store: Store) -> None:
    """With a stale version nothing is called or written; the error names the process of the newer one."""
    await update_document(store, COUNT, increment)
    with pytest.raises(VersionConflict) as caught:
        await update_document(store, COUNT, lambda _: pytest.fail("called"), expected_version=7)
    found = await store.get(COUNT)
    assert found is not None
    assert (caught.value.expected, caught.value.found, caught.value.writer) == (7, 1, found.writer)
    await update_document(store, COUNT, increment, expected_version=1)
    created = await update_document(store, Key("count", "new"), increment, expected_version=0)
    assert created is not None
    assert (created.value, created.version) == ({"n": 1}, 1)


async def test_update_to_none_deletes(store: Store) -> None:
    """Even if there is nothing to delete."""
    assert await update_document(store, COUNT, lambda _: None) is None
    assert await store.position() == 0
    await update_document(store, COUNT, increment, ttl=60)
    assert await update_document(store, COUNT, lambda _: None) is None
    newest = (await store.history(COUNT))[0]
    assert (newest.version, newest.value) == (2, None)


async def test_subscriber_gets_matching_changes(store: Store) -> None:
    """From now on, or from a position; a deletion is a change without a value."""
    await store.commit(Commit([Write(Key("task", "r/old"), 0, {})]))
    heard: list[DocumentChange] = []
    begun = anyio.Event()

    async def listen(after: int | None, count: int) -> None:
        async with aclosing(subscribe(store, "task/r/*", after)) as changes:
            begun.set()
            async for change in changes:
                heard.append(change)
                if len(heard) == count:
                    return

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(listen, 1, 2)
            await begun.wait()
            await store.commit(Commit([Write(Key("task", "r/a"), 0, {"n": 1}), Write(Key("task", "s/a"), 0, {})]))
            await store.commit(Commit([Write(Key("run", "r/a"), 0, {}), Write(Key("task", "r/a"), 1, None)]))
    assert [(one.key.id, one.version, one.value, one.position) for one in heard] == [
        ("r/a", 1, {"n": 1}, 2), ("r/a", 2, None, 3),
    ]  # fmt: skip
    heard.clear()
    with anyio.fail_after(10):
        await listen(0, 3)
    assert [one.key.id for one in heard] == ["r/old", "r/a", "r/a"]
