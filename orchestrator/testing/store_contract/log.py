"""The log: watching, history, earlier states, compaction and statistics."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
import anyio.lowlevel
import pytest

from orchestrator.errors import HistoryCompacted, RefusedError, VersionConflict
from orchestrator.protocols import LARGE_DOCUMENT_BYTES, VERSIONS_KEPT, Commit, Event, JsonObject, Key, Write
from orchestrator.testing.store_contract.suite import (
    COMPACTED_LOG,
    LEASE,
    OTHER_TASK,
    TASK,
    TIMEOUT,
    StoreSuite,
    make_commit,
    make_dump,
    read_dump,
    watch,
)

_COMMITS_WHILE_READING: Final = 60

# ruff: noqa: S101  this module is a test suite


class LogContract(StoreSuite):
    """The rules for commits as an ordered log."""

    async def test_watch_yields_complete_commits_in_order(self) -> None:
        """A record has documents with versions, deletions as None, and the events."""
        async with self.open_store() as store:
            happened = [Event("started", {"by": "ü"}), Event("seen")]
            await store.commit(Commit([Write(TASK, 0, {"n": 1}), Write(OTHER_TASK, 0, {"n": 2})], happened))
            await store.commit(Commit([Write(TASK, 1, None), Write(OTHER_TASK, 1, {"n": 3})]))
            await store.commit(Commit(events=[Event("alone")]))
            first, second, third = await watch(store, 0, 3)
            assert [first.position, second.position, third.position] == [1, 2, 3]
            assert dict(first.documents) == {TASK: (1, {"n": 1}), OTHER_TASK: (1, {"n": 2})}
            assert list(first.events) == happened
            assert dict(second.documents) == {TASK: (2, None), OTHER_TASK: (2, {"n": 3})}
            assert (dict(third.documents), list(third.events)) == ({}, [Event("alone")])
            assert not any(record.unreadable for record in (first, second, third))
            assert 0 < first.time <= third.time

    async def test_watch_after_a_position_yields_only_later_commits(self) -> None:
        """`watch(after)` yields exactly the commits after position `after`."""
        async with self.open_store() as store:
            for number in range(5):
                await store.commit(make_commit(TASK, number, {"n": number}))
            assert [record.position for record in await watch(store, 3, 2)] == [4, 5]

    async def test_watch_at_the_end_of_the_log_yields_later_commits(self) -> None:
        """A watcher that has reached the end receives each new commit."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 0}))
            seen: list[int] = []
            caught_up = anyio.Event()

            async def follow() -> None:
                async for record in store.watch():
                    seen.append(record.position)
                    caught_up.set()
                    if record.position == 4:
                        return

            with anyio.fail_after(TIMEOUT):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(follow)
                    await caught_up.wait()
                    for number in range(1, 4):
                        await store.commit(make_commit(TASK, number, {"n": number}))
            assert seen == [1, 2, 3, 4]

    async def test_history_has_author_time_and_events_of_each_version(self) -> None:
        """The newest version comes first; a deletion is a version without a value."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1})], [Event("made")]))
            await store.commit(make_commit(OTHER_TASK, 0, {"n": 9}))
            await store.commit(Commit([Write(TASK, 1, None)], [Event("dropped", {"why": "ü"})]))
            await store.commit(Commit([Write(TASK, 0, {"n": 3}), Write(OTHER_TASK, 1, {})]))
            found = await store.history(TASK)
            assert [(one.version, one.position, one.value) for one in found] == [
                (3, 4, {"n": 3}), (2, 3, None), (1, 1, {"n": 1}),
            ]  # fmt: skip
            assert [list(one.events) for one in found] == [[], [Event("dropped", {"why": "ü"})], [Event("made")]]
            assert not any(one.damaged for one in found)
            assert found[0].time >= found[1].time >= found[2].time > 0
            newest = await store.get(TASK)
            assert newest is not None
            assert {one.writer for one in found} == {newest.writer} != {""}
            assert list(await store.history(Key("task", "none"))) == []

    async def test_history_with_a_limit_returns_the_newest_versions(self) -> None:
        """The default limit is `VERSIONS_KEPT`; fewer are returned if the log has fewer."""
        async with self.open_store() as store:
            for number in range(15):
                await store.commit(make_commit(TASK, number, {"n": number}))
            for limit, first in ((VERSIONS_KEPT, 6), (3, 13), (100, 1)):
                versions = await (store.history(TASK) if limit == VERSIONS_KEPT else store.history(TASK, limit))
                assert [one.version for one in versions] == list(range(15, first - 1, -1))
                assert [one.value for one in versions] == [{"n": one.version - 1} for one in versions]

    async def test_state_at_an_earlier_position_is_reconstructed(self) -> None:
        """Each commit, including a deletion, leads to the next state; position 0 is empty."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1}), Write(OTHER_TASK, 0, {"n": 2})]))
            await store.commit(make_commit(TASK, 1, None))
            await store.commit(Commit(events=[Event("alone")]))
            await store.commit(make_commit(TASK, 0, {"n": 4}))
            expected: list[dict[Key, tuple[int, JsonObject]]] = [
                {}, {TASK: (1, {"n": 1}), OTHER_TASK: (1, {"n": 2})}, {OTHER_TASK: (1, {"n": 2})},
                {OTHER_TASK: (1, {"n": 2})},
                {OTHER_TASK: (1, {"n": 2}), TASK: (3, {"n": 4})},
            ]  # fmt: skip
            for position, documents in enumerate(expected):
                state = await store.at(position)
                assert {key: (one.version, one.value) for key, one in state.documents.items()} == documents
                assert state.position == position
            newest, state = await store.get(TASK), await store.at(4)
            assert newest is not None
            assert (state.documents[TASK], state.time) == (newest, newest.time)

    async def test_state_at_a_future_position_is_refused(self) -> None:
        """A position after the last commit is refused."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {}))
            with pytest.raises(RefusedError):
                await store.at(2)

    async def test_compaction_keeps_the_current_state(self) -> None:
        """Documents and versions are unchanged, and the rest of the log stays readable."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(OTHER_TASK, 0, {"n": 0}), Write(LEASE, 0, {})]))
            await store.commit(make_commit(LEASE, 1, None))
            for number in range(3 * VERSIONS_KEPT):
                await store.commit(make_commit(TASK, number, {"n": number}))
            documents = [await store.get(key) for key in (TASK, OTHER_TASK, LEASE)]
            versions, position = await store.history(TASK), await store.position()
            compacted = await store.compact(float("inf"), 0)
            assert [await store.get(key) for key in (TASK, OTHER_TASK, LEASE)] == documents
            assert await store.history(TASK) == versions
            assert (await store.at(position)).documents.keys() == {TASK, OTHER_TASK}
            assert (await store.at(compacted.first)).position == compacted.first
            if compacted.first:
                with pytest.raises(HistoryCompacted):
                    await store.at(compacted.first - 1)
                with pytest.raises(HistoryCompacted):
                    await watch(store, compacted.first - 1, 1)
            left = await watch(store, compacted.first, position - compacted.first)
            assert [record.position for record in left] == list(range(compacted.first + 1, position + 1))
            await store.commit(make_commit(LEASE, 0, {}))
            found = await store.get(LEASE)
            assert found is not None
            assert found.version == 3

    async def test_compaction_does_not_disturb_readers(self) -> None:
        """An earlier state that is compacted while it is read is reported as compacted."""
        async with self.open_store() as store:

            async def compact() -> None:
                while True:
                    await store.compact(float("inf"), 0)
                    await anyio.lowlevel.checkpoint()

            async def read() -> None:
                while True:
                    position = await store.position()
                    with suppress(HistoryCompacted):
                        assert (await store.at(position)).position == position
                    await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as group:
                for job in (compact, read, read, read, read):
                    group.start_soon(job)
                for number in range(_COMMITS_WHILE_READING):
                    versions = (Write(TASK, number, {"n": number}), Write(OTHER_TASK, number, {"n": number}))
                    await store.commit(Commit(versions, durable=False))
                group.cancel_scope.cancel()

    async def test_compaction_without_old_commits_prunes_nothing(self) -> None:
        """The whole log stays readable."""
        async with self.open_store() as store:
            for number in range(3 * VERSIONS_KEPT):
                await store.commit(make_commit(TASK, number, {"n": number}))
            assert (await store.compact(0.0, 1_000_000_000)).first == 0
            left = await watch(store, 0, 3 * VERSIONS_KEPT)
            assert [record.position for record in left] == list(range(1, 3 * VERSIONS_KEPT + 1))

    async def test_valid_store_is_verified_and_not_repaired(self) -> None:
        """Both report a valid store, and the repair adds no commit."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {}))
            verified = await store.verify()
            assert verified.is_valid
            assert (verified.position, verified.bytes > 0) == (1, True)
            assert (await store.repair()).is_valid
            assert await store.position() == 1

    async def test_commit_without_durability_is_checked_and_ordered(self) -> None:
        """It is also read and watched like any other commit."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1})], durable=False))
            with pytest.raises(VersionConflict):
                await store.commit(Commit([Write(TASK, 0, {"n": 2})], durable=False))
            await store.commit(make_commit(TASK, 1, {"n": 2}))
            assert [record.documents[TASK] for record in await watch(store, 0, 2)] == [(1, {"n": 1}), (2, {"n": 2})]

    async def test_statistics_count_documents_and_bytes(self) -> None:
        """The statistics include document sizes, large documents, and the size of the log."""
        async with self.open_store() as store:
            empty = await store.statistics()
            assert (empty.position, empty.documents, empty.bytes, empty.expired, empty.large) == (0, 0, 0, [], [])
            await store.commit(Commit([Write(TASK, 0, {"n": 1}), Write(LEASE, 0, {})]))
            await store.commit(make_commit(OTHER_TASK, 0, {"x": "x" * (LARGE_DOCUMENT_BYTES + 1)}))
            await store.commit(make_commit(LEASE, 1, None))
            found = await store.statistics()
            assert (found.position, found.documents) == (3, 2)
            (large,) = found.large
            assert large[0] == OTHER_TASK
            assert LARGE_DOCUMENT_BYTES < large[1] < found.bytes < large[1] + 100
            assert found.log_bytes > empty.log_bytes
            assert list(found.expired) == []


# ruff: noqa: S101  this module is a test suite


class PersistenceContract(StoreSuite):
    """The rules for reopening a store."""

    async def test_reopened_store_has_all_commits(self, tmp_path: Path) -> None:
        """Documents, versions, history, events and the position survive a restart."""
        if not self.is_persistent:
            pytest.skip("the store declares that its content is lost when it is closed")
        async with self.open_store_at(tmp_path) as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1})], [Event("one", {"n": 1})]))
            await store.commit(Commit([Write(TASK, 1, {"n": 2}), Write(OTHER_TASK, 0, {"n": 1})], durable=False))
            expected, document = await read_dump(store), await store.get(TASK)
        async with self.open_store_at(tmp_path) as store:
            assert document is not None
            assert await store.get(TASK) == document
            assert await read_dump(store) == expected
            assert list(store.damage) == []
            assert bool(store.local_paths()) == self.is_local, "`local_paths` contradicts `is_local` of the suite"
            assert await store.commit(make_commit(TASK, document.version, {"n": 3})) == expected[0] + 1

    async def test_reopened_store_has_loaded_commits(self, tmp_path: Path) -> None:
        """A loaded store has the same dump after it was closed."""
        if not self.is_persistent:
            pytest.skip("the store declares that its content is lost when it is closed")
        async with self.open_store_at(tmp_path) as store:
            await store.load(make_dump(COMPACTED_LOG, 8, 6))
            expected = await read_dump(store)
        async with self.open_store_at(tmp_path) as store:
            assert await read_dump(store) == expected
            assert (await store.verify()).is_valid

    async def test_local_paths_of_a_used_store_are_absolute_and_exist(self) -> None:
        """The sandbox can only hide declared, existing paths from sessions."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            paths = store.local_paths()
            assert all(path.is_absolute() and path.exists() for path in paths)
