"""The contract of every store, as tests: subclass `StoreContract` and override `open_store` and `open_store_at`.

Needs pytest with pytest-asyncio in its auto mode (or mark your subclass `pytest.mark.asyncio`).
"""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest

from orchestrator.errors import HistoryCompacted, InvalidDocument, LeaseLost, RefusedError, VersionConflict
from orchestrator.protocols import (
    LARGE_DOCUMENT_BYTES,
    VERSIONS_KEPT,
    Commit,
    CommitRecord,
    Dump,
    DumpedCommit,
    DumpedDocument,
    Event,
    Guard,
    JsonObject,
    Key,
    Store,
    Write,
)

TASK = Key("task", "a")
OTHER_TASK = Key("task", "b")
LEASE = Key("lease", "a")
TIMEOUT = 10.0
"""Seconds after which a waiting test fails."""


def _nested(depth: int) -> JsonObject:
    value: JsonObject = {}
    for _ in range(depth):
        value = {"in": value}
    return value


INVALID_VALUES: dict[str, Any] = {
    "NaN": {"x": float("nan")},
    "infinity": {"x": [1.0, float("inf")]},
    "lone surrogate": {"x": "\ud800"},
    "lone surrogate in a field name": {"\udfff": 1},
    "too deep": _nested(2_000),
    "too large": {"x": "x" * (5 << 20)},
    "field name that is a number": {"x": {1: "a"}},
    "field name that is None": {None: 1},
    "integer of 5,000 digits": {"x": 10**5_000},
    "bytes": {"x": b"a"},
    "list": [1],
    "text": "x",
}


#: A log that was compacted up to position 6: some of those commits are missing, others are incomplete.
COMPACTED_LOG: Sequence[DumpedCommit] = (
    DumpedCommit(
        2, 1e9, "ada@box:1", (DumpedDocument(TASK, 2, b'{"n":2}', previous=1),), (Event("two", {"n": 2**70}),)
    ),
    DumpedCommit(3, 1e9 + 0.5, "ada@box:1", (DumpedDocument(OTHER_TASK, 4, None, previous=1),)),
    DumpedCommit(5, 1e9 - 9, "bob@box:2", (DumpedDocument(TASK, 3, b'{"n": 3.50}', 2e9, previous=2),)),
    DumpedCommit(7, 1e9 + 1, "bob@box:2", (), (Event("seven"),)),
    DumpedCommit(8, 1e9 + 2, "bob@box:2", (DumpedDocument(TASK, 4, '{"n":"ü"}'.encode(), 1e9 + 3, previous=5),)),
)


def make_dump(
    commits: Sequence[DumpedCommit], position: int, first: int = 0, *, error: Exception | None = None
) -> Dump:
    """Return a handmade dump of these commits; if given, `error` is raised after them."""

    async def generate() -> AsyncGenerator[DumpedCommit]:
        for commit in commits:
            yield commit
        if error is not None:
            raise error

    return Dump(position, first, generate())


async def read_dump(store: Store) -> tuple[int, int, list[DumpedCommit]]:
    """Return the position, the first position and the commits of a store's dump."""
    async with store.dump() as dump:
        return dump.position, dump.first, [commit async for commit in dump.commits]


def make_commit(key: Key, expected: int, value: JsonObject | None) -> Commit:
    """Return a commit with one write."""
    return Commit([Write(key, expected, value)])


class StoreContract(ABC):
    """The suite for the contract of `orchestrator.protocols.Store`."""

    is_persistent: ClassVar[bool] = True
    """Whether a store that is opened again has its content: override `open_store_at`."""
    is_local: ClassVar[bool] = False
    """Whether its data is in files on this machine, which `local_paths` must return."""

    @abstractmethod
    def open_store(self) -> AbstractAsyncContextManager[Store]:
        """Return a context manager that opens a new, empty store for one test."""

    def open_store_at(self, place: Path) -> AbstractAsyncContextManager[Store]:
        """Return a context manager that opens the store of a place: first empty, later with its content.

        A place is an empty folder of one test; a store on a server can use its path as a name.
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name}, {place}: override `open_store_at`, or set `is_persistent = False`")

    async def test_reopened_store_has_what_was_committed(self, tmp_path: Path) -> None:
        """Documents, versions, history, events and the position survive that the store is closed."""
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

    async def test_reopened_store_has_what_was_loaded(self, tmp_path: Path) -> None:
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

    async def test_empty_store_has_position_0_and_no_documents(self) -> None:
        """A new store is at position 0, without documents and without damage."""
        async with self.open_store() as store:
            assert await store.position() == 0
            assert await store.get(TASK) is None
            assert list(await store.list("task")) == []
            assert list(store.damage) == []

    async def test_reads_of_an_empty_store_return_at_once(self) -> None:
        """Only `watch` waits for a first commit."""
        async with self.open_store() as store:
            with anyio.fail_after(10):
                assert (await store.at(0)).documents == {}
                assert list(await store.history(TASK)) == []
                assert list(await store.list("task")) == []
                assert (await store.statistics()).position == 0
                assert (await store.verify()).is_valid
                assert (await store.repair()).is_valid
                assert (await store.compact(0.0, 0)).first == 0
                assert await read_dump(store) == (0, 0, [])

    async def test_consecutive_commits_number_versions_and_positions_from_one(self) -> None:
        """Each commit gets the next position, and each write of a document its next version."""
        async with self.open_store() as store:
            for number in range(1, 6):
                assert await store.commit(make_commit(TASK, number - 1, {"n": number})) == number
                document = await store.get(TASK)
                assert document is not None
                assert (document.key, document.version, document.value) == (TASK, number, {"n": number})
                assert (document.position, document.damaged) == (number, False)
            assert await store.position() == 5

    @pytest.mark.parametrize("expected", [0, 1, 3, -1])
    async def test_write_expecting_another_version_conflicts(self, expected: int) -> None:
        """The write changes nothing, and the error contains the current version and its author."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            await store.commit(make_commit(TASK, 1, {"n": 2}))
            with pytest.raises(VersionConflict) as caught:
                await store.commit(make_commit(TASK, expected, {"n": 3}))
            assert (caught.value.expected, caught.value.found) == (expected, 2)
            newest = await store.get(TASK)
            assert newest is not None
            assert (caught.value.by, caught.value.time) == (newest.by, newest.time)
            assert newest.by in str(caught.value)
            await _assert_only(store, {TASK: (2, {"n": 2})}, position=2)

    async def test_write_of_an_absent_document_finds_version_0(self) -> None:
        """A write that expects version 1 of a document that was never written conflicts."""
        async with self.open_store() as store:
            with pytest.raises(VersionConflict) as caught:
                await store.commit(make_commit(TASK, 1, {}))
            assert caught.value.found == 0
            await _assert_only(store, {}, position=0)

    async def test_recreated_document_continues_its_version_numbers(self) -> None:
        """A deletion is a version. A new write expects version 0 and gets the next number."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            await store.commit(make_commit(TASK, 1, None))
            await _assert_only(store, {}, position=2)
            with pytest.raises(VersionConflict) as caught:
                await store.commit(make_commit(TASK, 1, {"n": 9}))
            assert caught.value.found == 0
            await store.commit(make_commit(TASK, 0, {"n": 3}))
            await _assert_only(store, {TASK: (3, {"n": 3})}, position=3)

    async def test_commit_of_several_documents_is_atomic(self) -> None:
        """All writes of a commit take effect at one position."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1}), Write(OTHER_TASK, 0, {"n": 2})]))
            await _assert_only(store, {TASK: (1, {"n": 1}), OTHER_TASK: (1, {"n": 2})}, position=1)
            assert {document.position for document in await store.list("task")} == {1}

    @pytest.mark.parametrize(
        "bad", [Write(OTHER_TASK, 7, {}), Write(OTHER_TASK, 0, {"x": float("nan")}), Write(TASK, 2, {})]
    )
    async def test_commit_with_one_invalid_write_changes_nothing(self, bad: Write) -> None:
        """A write is invalid if it conflicts, can't be stored, or writes a document a second time."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            with pytest.raises((VersionConflict, InvalidDocument)):
                await store.commit(Commit([Write(TASK, 1, {"n": 2}), bad], [Event("never")]))
            await _assert_only(store, {TASK: (1, {"n": 1})}, position=1)

    async def test_guard_with_the_current_epoch_accepts_the_commit(self) -> None:
        """This includes a commit that renews the lease itself."""
        async with self.open_store() as store:
            await store.commit(make_commit(LEASE, 0, {"epoch": 4}))
            guard = Guard(LEASE, 4)
            renewal = Write(LEASE, 1, {"epoch": 4, "until": 9})
            assert await store.commit(Commit([Write(TASK, 0, {}), renewal], guards=[guard])) == 2

    @pytest.mark.parametrize("lease", [{"epoch": 5}, {"epoch": 3}, {}, None])
    async def test_guard_with_another_epoch_refuses_the_commit(self, lease: JsonObject | None) -> None:
        """A lease without an epoch and a missing lease are refused, too; nothing changes."""
        async with self.open_store() as store:
            if lease is not None:
                await store.commit(make_commit(LEASE, 0, lease))
            before = await store.position()
            with pytest.raises(LeaseLost) as caught:
                await store.commit(Commit([Write(TASK, 0, {})], guards=[Guard(LEASE, 4)]))
            assert (caught.value.held, caught.value.current) == (4, (lease or {}).get("epoch"))
            assert await store.get(TASK) is None
            assert await store.position() == before

    async def test_guard_of_a_deleted_lease_refuses_the_commit(self) -> None:
        """The last epoch of a deleted lease is refused."""
        async with self.open_store() as store:
            await store.commit(make_commit(LEASE, 0, {"epoch": 4}))
            await store.commit(make_commit(LEASE, 1, None))
            with pytest.raises(LeaseLost):
                await store.commit(Commit(guards=[Guard(LEASE, 4)]))

    async def test_watch_yields_complete_commits_in_order(self) -> None:
        """Each record has the documents with their versions, deletions as None, and the events."""
        async with self.open_store() as store:
            happened = [Event("started", {"by": "ü"}), Event("seen")]
            await store.commit(Commit([Write(TASK, 0, {"n": 1}), Write(OTHER_TASK, 0, {"n": 2})], happened))
            await store.commit(Commit([Write(TASK, 1, None), Write(OTHER_TASK, 1, {"n": 3})]))
            await store.commit(Commit(events=[Event("alone")]))
            first, second, third = await _watch(store, 0, 3)
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
            assert [record.position for record in await _watch(store, 3, 2)] == [4, 5]

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
            assert {one.by for one in found} == {newest.by} != {""}
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
        """Documents and their last versions are unchanged, and the rest of the log stays readable."""
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
                    await _watch(store, compacted.first - 1, 1)
            left = await _watch(store, compacted.first, position - compacted.first)
            assert [record.position for record in left] == list(range(compacted.first + 1, position + 1))
            await store.commit(make_commit(LEASE, 0, {}))
            found = await store.get(LEASE)
            assert found is not None
            assert found.version == 3

    async def test_valid_store_is_verified_and_not_repaired(self) -> None:
        """Both report a valid store, and the repair adds no commit."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {}))
            verified = await store.verify()
            assert verified.is_valid
            assert (verified.position, verified.bytes > 0) == (1, True)
            assert (await store.repair()).is_valid
            assert await store.position() == 1

    async def test_loaded_copy_equals_the_original_at_every_position(self) -> None:
        """Positions, times, authors, versions, expiries, events and deletions are those of the original."""
        async with self.open_store() as store, self.open_store() as copy:
            lease = {"epoch": 3, "text": "ü\n\u2028", "big": 2**70, "small": -0.0}
            await store.commit(
                Commit([Write(TASK, 0, {"n": 1}), Write(LEASE, 0, lease, ttl=3600)], [Event("ü", lease)])
            )
            await store.commit(Commit([Write(OTHER_TASK, 0, {"n": 1}, ttl=1e-6)]))
            await store.commit(Commit(events=[Event("alone"), Event("twice")]))
            await store.commit(Commit([Write(TASK, 1, None), Write(LEASE, 1, {"epoch": 4}, ttl=7200)], durable=False))
            await store.commit(make_commit(TASK, 0, {"n": 2}))
            await store.commit(Commit([Write(TASK, 3, None)]))
            async with store.dump() as dump:
                await copy.load(dump)
            assert await read_dump(copy) == await read_dump(store)
            assert await copy.position() == 6
            for position in range(7):
                assert await copy.at(position) == await store.at(position)
            assert await _watch(copy, 0, 6) == await _watch(store, 0, 6)
            for key in (TASK, OTHER_TASK, LEASE):
                assert await copy.get(key) == await store.get(key)
                assert await copy.history(key) == await store.history(key)
            assert (await copy.verify()).is_valid
            await copy.commit(Commit([Write(TASK, 0, {"n": 3})], guards=[Guard(LEASE, 4)]))
            found = await copy.get(TASK)
            assert found is not None
            assert (found.version, found.position) == (5, 7)

    async def test_loaded_compacted_dump_keeps_its_remaining_history(self) -> None:
        """The copy keeps the gaps, can be dumped again and accepts commits."""
        async with self.open_store() as store:
            await store.load(make_dump(COMPACTED_LOG, 8, 6))
            assert await read_dump(store) == (8, 6, list(COMPACTED_LOG))
            assert (await store.verify()).is_valid
            assert await store.position() == 8
            with pytest.raises(HistoryCompacted) as caught:
                await store.at(5)
            assert caught.value.first == 6
            with pytest.raises(HistoryCompacted):
                await _watch(store, 5, 1)
            state = await store.at(6)
            assert (state.position, state.time) == (6, 1e9 - 9)
            assert {key: (one.version, one.value, one.expires) for key, one in state.documents.items()} == {
                TASK: (3, {"n": 3.5}, 2e9)
            }
            assert [(one.position, one.time, one.by) for one in await _watch(store, 6, 2)] == [
                (7, 1e9 + 1, "bob@box:2"), (8, 1e9 + 2, "bob@box:2"),
            ]  # fmt: skip
            history = await store.history(TASK)
            assert [(one.version, one.value) for one in history] == [(4, {"n": "ü"}), (3, {"n": 3.5}), (2, {"n": 2})]
            assert list(history[2].events) == [Event("two", {"n": 2**70})]
            assert await store.get(TASK) is None  # expired
            await store.commit(Commit([Write(OTHER_TASK, 0, {}), Write(TASK, 0, {})]))
            assert [one.version for one in await store.list("task")] == [5, 5]
            assert await store.position() == 9

    async def test_a_copy_may_end_where_its_past_begins(self) -> None:
        """There need not be any commit after the compacted ones."""
        async with self.open_store() as store:
            await store.load(make_dump(COMPACTED_LOG[:3], 6, 6))
            assert await read_dump(store) == (6, 6, list(COMPACTED_LOG[:3]))
            assert (await store.at(6)).documents.keys() == {TASK}
            assert await store.commit(Commit(events=[Event("next")])) == 7
            assert [one.position for one in await _watch(store, 6, 1)] == [7]
            assert (await store.verify()).is_valid

    async def test_a_dump_is_of_one_moment(self) -> None:
        """Commits made while the dump is open are not part of it and need not wait."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            with anyio.fail_after(TIMEOUT):
                async with store.dump() as dump:
                    await store.commit(make_commit(TASK, 1, {"n": 2}))
                    assert (dump.position, dump.first) == (1, 0)
                    assert [commit.position async for commit in dump.commits] == [1]
            assert [commit.position for commit in (await read_dump(store))[2]] == [1, 2]

    async def test_an_empty_store_can_be_copied(self) -> None:
        """The copy is also empty."""
        async with self.open_store() as store, self.open_store() as copy:
            async with store.dump() as dump:
                await copy.load(dump)
            assert await read_dump(copy) == (0, 0, [])
            assert await copy.commit(make_commit(TASK, 0, {})) == 1

    async def test_only_an_empty_store_is_loaded(self) -> None:
        """Committed data is never replaced."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            with pytest.raises(RefusedError):
                await store.load(make_dump(COMPACTED_LOG, 8, 6))
            await _assert_only(store, {TASK: (1, {"n": 1})}, position=1)

    @pytest.mark.parametrize(
        ("commits", "position", "first"),
        [
            (COMPACTED_LOG[:4], 8, 6),
            (COMPACTED_LOG, 9, 6),
            (COMPACTED_LOG, 7, 6),
            (COMPACTED_LOG, 8, 5),
            ((*COMPACTED_LOG[:3], *COMPACTED_LOG[4:]), 8, 6),
            ((*COMPACTED_LOG[:3], COMPACTED_LOG[1], *COMPACTED_LOG[3:]), 8, 6),
            ((), 8, 0),
            (COMPACTED_LOG, 0, 0),
        ],
        ids=[
            "last commit missing",
            "position too high",
            "position too low",
            "first too low",
            "commit missing",
            "wrong order",
            "no commits",
            "position 0",
        ],
    )
    async def test_incomplete_dump_is_refused(self, commits: Sequence[DumpedCommit], position: int, first: int) -> None:
        """Afterwards the store is empty and can be loaded."""
        async with self.open_store() as store:
            with pytest.raises(RefusedError):
                await store.load(make_dump(commits, position, first))
            assert await read_dump(store) == (0, 0, [])
            await store.load(make_dump(COMPACTED_LOG, 8, 6))
            assert (await read_dump(store))[0] == 8

    @pytest.mark.parametrize(
        "last", [OSError("gone"), replace(COMPACTED_LOG[4], events=[Event("e", {"n": float("nan")})])]
    )
    async def test_interrupted_load_leaves_an_empty_store(self, last: OSError | DumpedCommit) -> None:
        """A load fails if its dump raises an error or has a value that can't be stored."""
        async with self.open_store() as store:
            if isinstance(last, OSError):
                with pytest.raises(OSError, match="gone"):
                    await store.load(make_dump(COMPACTED_LOG, 8, 6, error=last))
            else:
                with pytest.raises(InvalidDocument):
                    await store.load(make_dump((*COMPACTED_LOG[:4], last), 8, 6))
            assert await read_dump(store) == (0, 0, [])
            await store.load(make_dump(COMPACTED_LOG, 8, 6))
            assert (await read_dump(store))[0] == 8

    async def test_one_of_two_concurrent_loads_is_refused(self) -> None:
        """The other load is complete."""
        async with self.open_store() as store:
            refused = list[RefusedError]()

            async def load() -> None:
                try:
                    await store.load(make_dump(COMPACTED_LOG, 8, 6))
                except RefusedError as error:
                    refused.append(error)

            with anyio.fail_after(TIMEOUT):
                async with anyio.create_task_group() as tasks:
                    for _ in range(2):
                        tasks.start_soon(load)
            assert len(refused) == 1
            assert await read_dump(store) == (8, 6, list(COMPACTED_LOG))

    async def test_watch_of_an_empty_store_yields_loaded_commits(self) -> None:
        """If the first commits were compacted, the watcher receives `HistoryCompacted`."""
        async with self.open_store() as store:
            seen = list[CommitRecord]()

            async def follow() -> None:
                seen.extend(await _watch(store, 0, 2))

            with anyio.fail_after(TIMEOUT):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(follow)
                    await anyio.lowlevel.checkpoint()
                    await store.load(
                        make_dump([replace(COMPACTED_LOG[3], position=1), replace(COMPACTED_LOG[4], position=2)], 2)
                    )
            assert [record.position for record in seen] == [1, 2]
        async with self.open_store() as store:
            gone = anyio.Event()

            async def expect_gone() -> None:
                with pytest.raises(HistoryCompacted):
                    await _watch(store, 0, 1)
                gone.set()

            with anyio.fail_after(TIMEOUT):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(expect_gone)
                    await anyio.lowlevel.checkpoint()
                    await store.load(make_dump(COMPACTED_LOG, 8, 6))
                    await gone.wait()

    async def test_expired_document_is_treated_as_deleted(self) -> None:
        """An expired document is not read, listed or accepted as a guard; a new write expects version 0."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1}, ttl=1e-6), Write(LEASE, 0, {"epoch": 1}, ttl=1e-6)]))
            with anyio.fail_after(TIMEOUT):
                while await store.get(TASK) is not None:  # noqa: ASYNC110  the store has its own clock
                    await anyio.sleep(0.001)
            assert list(await store.list("task")) == []
            with pytest.raises(LeaseLost):
                await store.commit(Commit([Write(OTHER_TASK, 0, {})], guards=[Guard(LEASE, 1)]))
            with pytest.raises(VersionConflict) as caught:
                await store.commit(make_commit(TASK, 1, {"n": 2}))
            assert caught.value.found == 0
            await store.commit(make_commit(TASK, 0, {"n": 2}))
            await _assert_only(store, {TASK: (2, {"n": 2})}, position=2)

    async def test_write_with_another_ttl_replaces_the_expiry(self) -> None:
        """Each write resets the expiry; a write without a `ttl` removes it."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1}, ttl=3600)]))
            first = await store.get(TASK)
            await store.commit(Commit([Write(TASK, 1, {"n": 2}, ttl=7200)]))
            second = await store.get(TASK)
            assert first is not None
            assert second is not None
            assert first.expires == pytest.approx(first.time + 3600)
            assert second.expires == pytest.approx(second.time + 7200)
            await store.commit(make_commit(TASK, 2, {"n": 3}))
            third = await store.get(TASK)
            assert third is not None
            assert third.expires is None

    @pytest.mark.parametrize("ttl", [0.0, -1.0, float("nan"), float("inf")])
    async def test_invalid_ttl_is_refused(self, ttl: float) -> None:
        """A `ttl` must be a positive, finite number of seconds."""
        async with self.open_store() as store:
            with pytest.raises(InvalidDocument):
                await store.commit(Commit([Write(TASK, 0, {}, ttl=ttl)]))
            await _assert_only(store, {}, position=0)

    async def test_commit_without_durability_is_checked_and_ordered(self) -> None:
        """It is also read and watched like any other commit."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1})], durable=False))
            with pytest.raises(VersionConflict):
                await store.commit(Commit([Write(TASK, 0, {"n": 2})], durable=False))
            await store.commit(make_commit(TASK, 1, {"n": 2}))
            assert [record.documents[TASK] for record in await _watch(store, 0, 2)] == [(1, {"n": 1}), (2, {"n": 2})]

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

    async def test_list_with_a_prefix_returns_one_kind_in_order(self) -> None:
        """The documents are ordered by id, and deleted ones are omitted."""
        async with self.open_store() as store:
            ids = ["r1/b", "r10/a", "r1/a", "r1/é", "r2/a", "r1/gone"]
            await store.commit(Commit([Write(Key("task", name), 0, {"id": name}) for name in ids]))
            await store.commit(Commit([Write(Key("run", "r1/x"), 0, {}), Write(Key("task", "r1/gone"), 1, None)]))
            await store.commit(make_commit(Key("task", "r1/aa"), 0, {"id": "r1/aa"}))
            listed = await store.list("task", "r1/")
            assert [document.key.id for document in listed] == ["r1/a", "r1/aa", "r1/b", "r1/é"]
            assert all(document.value == {"id": document.key.id} for document in listed)
            assert len(await store.list("task")) == 6
            assert [document.key.id for document in await store.list("task", "r1/b")] == ["r1/b"]
            assert list(await store.list("phase")) == []

    async def test_changed_value_does_not_change_the_store(self) -> None:
        """This applies to values written, read or listed."""
        async with self.open_store() as store:
            value: JsonObject = {"list": [1]}
            await store.commit(make_commit(TASK, 0, value))
            value["list"].append(2)
            read = await store.get(TASK)
            assert read is not None
            read.value["list"].append(3)
            (await store.list("task"))[0].value["list"].append(4)
            await _assert_only(store, {TASK: (1, {"list": [1]})}, position=1)

    async def test_plain_json_is_returned_unchanged(self) -> None:
        """Values and names include text from every Unicode plane, control characters, big integers and floats."""
        value = {
            "text": 'a\n\r\t\0\u2028"\\ ü 漢 \U0001f600',
            "\n]]}\x7f": [],
            "numbers": [0, -1, 2**70, 0.1, 1e300, -0.0],
            "rest": [True, False, None, {}, [[]], ""],
        }
        key = Key("kind with\nnewline", 'id "quoted"/ü/../\0')
        async with self.open_store() as store:
            await store.commit(Commit([Write(key, 0, value)], [Event("ü\n", value)]))
            document = await store.get(key)
            assert document is not None
            assert document.value == value
            (record,) = await _watch(store, 0, 1)
            assert record.documents[key] == (1, value)
            assert list(record.events) == [Event("ü\n", value)]

    @pytest.mark.parametrize("value", INVALID_VALUES.values(), ids=INVALID_VALUES)
    async def test_value_that_is_not_plain_json_is_refused(self, value: Any) -> None:
        """A value that JSON can't express or that exceeds a limit is refused in documents and events."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            for bad in (make_commit(TASK, 1, value), Commit([Write(TASK, 1, {})], [Event("e", value)])):
                with pytest.raises(InvalidDocument):
                    await store.commit(bad)
            await _assert_only(store, {TASK: (1, {"n": 1})}, position=1)

    async def test_one_of_concurrent_writers_wins_each_version(self) -> None:
        """Of 40 concurrent commits that expect the same version, one is accepted; the others conflict."""
        async with self.open_store() as store:
            winners: list[tuple[int, int]] = []

            async def compete(name: int, expected: int) -> None:
                try:
                    await store.commit(make_commit(TASK, expected, {"by": name}))
                except VersionConflict:
                    return
                winners.append((expected, name))

            for expected in range(5):
                async with anyio.create_task_group() as tasks:
                    for name in range(40):
                        tasks.start_soon(compete, name, expected)
            assert [expected for expected, _ in winners] == list(range(5))
            records = await _watch(store, 0, 5)
            assert [record.documents[TASK] for record in records] == [
                (expected + 1, {"by": name}) for expected, name in winners
            ]
            assert await store.position() == 5

    async def test_concurrent_commits_of_different_documents_are_all_accepted(self) -> None:
        """40 concurrent commits to 40 documents are all accepted, each at its own position."""
        async with self.open_store() as store:
            positions: list[int] = []

            async def create(name: int) -> None:
                positions.append(await store.commit(make_commit(Key("task", str(name)), 0, {"n": name})))

            async with anyio.create_task_group() as tasks:
                for name in range(40):
                    tasks.start_soon(create, name)
            assert sorted(positions) == list(range(1, 41))
            assert len(await store.list("task")) == 40

    async def test_cancelled_commit_is_complete_or_absent(self) -> None:
        """The store stays usable afterwards."""
        async with self.open_store() as store:

            async def commit(name: int) -> None:
                pair = [Write(Key("left", str(name)), 0, {}), Write(Key("right", str(name)), 0, {})]
                await store.commit(Commit(pair))

            async with anyio.create_task_group() as tasks:
                for name in range(20):
                    tasks.start_soon(commit, name)
                await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            left = [document.key.id for document in await store.list("left")]
            assert left == [document.key.id for document in await store.list("right")]
            assert await store.position() == len(left)
            assert await store.commit(make_commit(TASK, 0, {})) == len(left) + 1


async def _assert_only(store: Store, documents: dict[Key, tuple[int, JsonObject]], position: int) -> None:
    found = [document for kind in ("task", "lease") for document in await store.list(kind)]
    assert {document.key: (document.version, document.value) for document in found} == documents
    for key in (TASK, OTHER_TASK):
        document = await store.get(key)
        assert (document and (document.version, document.value)) == documents.get(key)
    assert await store.position() == position


async def _watch(store: Store, after: int, count: int) -> list[CommitRecord]:
    """Return the first `count` records after position `after`."""
    records: list[CommitRecord] = []
    with anyio.fail_after(TIMEOUT):
        if count == 0:
            return []
        async for record in store.watch(after):
            records.append(record)
            if len(records) == count:
                break
    return records
