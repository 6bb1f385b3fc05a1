"""Documents: versions, conflicts, atomic commits, values and concurrent writers."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from orchestrator.errors import InvalidDocument, LeaseLost, StateError, VersionConflict
from orchestrator.protocols import Commit, Event, Guard, JsonObject, Key, Write
from orchestrator.testing.store_contract.suite import (
    LEASE,
    OTHER_TASK,
    TASK,
    TIMEOUT,
    StoreSuite,
    assert_only,
    make_commit,
    read_dump,
    watch,
)

# ruff: noqa: S101  this module is a test suite


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


class DocumentContract(StoreSuite):
    """The rules for reading, listing and writing documents."""

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
        """A commit gets the next position, and a write the next version of its document."""
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
        """The write changes nothing; the error has the current version and its author."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            await store.commit(make_commit(TASK, 1, {"n": 2}))
            with pytest.raises(VersionConflict) as caught:
                await store.commit(make_commit(TASK, expected, {"n": 3}))
            assert (caught.value.expected, caught.value.found) == (expected, 2)
            newest = await store.get(TASK)
            assert newest is not None
            assert (caught.value.writer, caught.value.time) == (newest.writer, newest.time)
            assert newest.writer in str(caught.value)
            await assert_only(store, {TASK: (2, {"n": 2})}, position=2)

    async def test_write_of_an_absent_document_finds_version_0(self) -> None:
        """A write that expects version 1 of a document that was never written conflicts."""
        async with self.open_store() as store:
            with pytest.raises(VersionConflict) as caught:
                await store.commit(make_commit(TASK, 1, {}))
            assert caught.value.found == 0
            await assert_only(store, {}, position=0)

    async def test_recreated_document_continues_its_version_numbers(self) -> None:
        """A deletion is a version. A new write expects version 0 and gets the next number."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            await store.commit(make_commit(TASK, 1, None))
            await assert_only(store, {}, position=2)
            with pytest.raises(VersionConflict) as caught:
                await store.commit(make_commit(TASK, 1, {"n": 9}))
            assert caught.value.found == 0
            await store.commit(make_commit(TASK, 0, {"n": 3}))
            await assert_only(store, {TASK: (3, {"n": 3})}, position=3)

    async def test_commit_of_several_documents_is_atomic(self) -> None:
        """All writes of a commit take effect at one position."""
        async with self.open_store() as store:
            await store.commit(Commit([Write(TASK, 0, {"n": 1}), Write(OTHER_TASK, 0, {"n": 2})]))
            await assert_only(store, {TASK: (1, {"n": 1}), OTHER_TASK: (1, {"n": 2})}, position=1)
            assert {document.position for document in await store.list("task")} == {1}

    @pytest.mark.parametrize(
        "bad", [Write(OTHER_TASK, 7, {}), Write(OTHER_TASK, 0, {"x": float("nan")}), Write(TASK, 2, {})]
    )
    async def test_commit_with_one_invalid_write_changes_nothing(self, bad: Write) -> None:
        """A write is invalid if it conflicts, can't be stored, or repeats a document."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            with pytest.raises((VersionConflict, InvalidDocument)):
                await store.commit(Commit([Write(TASK, 1, {"n": 2}), bad], [Event("never")]))
            await assert_only(store, {TASK: (1, {"n": 1})}, position=1)

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
            await assert_only(store, {TASK: (1, {"list": [1]})}, position=1)

    async def test_plain_json_is_returned_unchanged(self) -> None:
        """Values and names may include any Unicode character, big integers and floats."""
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
            (record,) = await watch(store, 0, 1)
            assert record.documents[key] == (1, value)
            assert list(record.events) == [Event("ü\n", value)]

    @pytest.mark.parametrize("value", INVALID_VALUES.values(), ids=INVALID_VALUES)
    async def test_value_that_is_not_plain_json_is_refused(self, value: Any) -> None:
        """Documents and events can't have a value that is too large or not JSON."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            for bad in (make_commit(TASK, 1, value), Commit([Write(TASK, 1, {})], [Event("e", value)])):
                with pytest.raises(InvalidDocument):
                    await store.commit(bad)
            await assert_only(store, {TASK: (1, {"n": 1})}, position=1)

    async def test_one_of_concurrent_writers_wins_each_version(self) -> None:
        """Of 40 concurrent commits that expect the same version, one is accepted."""
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
            records = await watch(store, 0, 5)
            assert [record.documents[TASK] for record in records] == [
                (expected + 1, {"by": name}) for expected, name in winners
            ]
            assert await store.position() == 5

    async def test_concurrent_commits_of_different_documents_are_all_accepted(self) -> None:
        """Of 40 concurrent commits to 40 documents, each gets its own position."""
        async with self.open_store() as store:
            positions: list[int] = []

            async def create(name: int) -> None:
                positions.append(await store.commit(make_commit(Key("task", str(name)), 0, {"n": name})))

            async with anyio.create_task_group() as tasks:
                for name in range(40):
                    tasks.start_soon(create, name)
            assert sorted(positions) == list(range(1, 41))
            assert len(await store.list("task")) == 40

    async def test_rejected_commit_does_not_affect_concurrent_ones(self) -> None:
        """Each has its own outcome, position and events, also if a store applies them together."""
        async with self.open_store() as store:
            owner, keys = Key("lease", "me"), [Key("claim", name) for name in "abcd"]
            await store.commit(Commit([Write(owner, 0, {"epoch": 1}), Write(keys[1], 0, {})]))
            outcomes = dict[Key, int | StateError]()

            async def claim(key: Key, epoch: int) -> None:
                try:
                    outcomes[key] = await store.commit(
                        Commit([Write(key, 0, {"n": key.id})], [Event(key.id)], [Guard(owner, epoch)])
                    )
                except StateError as error:
                    outcomes[key] = error

            async with anyio.create_task_group() as group:
                for key in keys:
                    group.start_soon(claim, key, 2 if key == keys[3] else 1)
            records = await watch(store, 1, 2)
        assert isinstance(conflict := outcomes[keys[1]], VersionConflict)
        assert (conflict.expected, conflict.found, "claim/b" in str(conflict)) == (0, 1, True)
        assert isinstance(lost := outcomes[keys[3]], LeaseLost)
        assert (lost.subject, lost.held, lost.current) == ("lease/me", 2, 1)
        assert {(outcomes[keys[0]], keys[0], "a"), (outcomes[keys[2]], keys[2], "c")} == {
            (one.position, *one.documents, one.events[0].type) for one in records
        }

    async def test_position_during_commits_never_decreases(self) -> None:
        """Replies to concurrent calls arrive in any order."""
        async with self.open_store() as store:

            async def read() -> None:
                newest = 0
                while newest < 100:
                    position = await store.position()
                    assert newest <= position <= 100
                    newest = position
                    await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(read)
                for number in range(100):
                    await store.commit(Commit(events=[Event("e", {"n": number})], durable=False))

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


# ruff: noqa: S101  this module is a test suite


class LeaseContract(StoreSuite):
    """The rules for guards and expiry."""

    async def test_guard_with_the_current_epoch_accepts_the_commit(self) -> None:
        """This includes a commit that renews the lease itself."""
        async with self.open_store() as store:
            await store.commit(make_commit(LEASE, 0, {"epoch": 4}))
            guard = Guard(LEASE, 4)
            renewal = Write(LEASE, 1, {"epoch": 4, "until": 9})
            assert await store.commit(Commit([Write(TASK, 0, {}), renewal], guards=[guard])) == 2

    @pytest.mark.parametrize("lease", [{"epoch": 5}, {"epoch": 3}, {}, None])
    async def test_guard_with_another_epoch_refuses_the_commit(self, lease: JsonObject | None) -> None:
        """A guard on a missing lease or one without an epoch is also rejected; nothing changes."""
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

    async def test_expired_document_is_treated_as_deleted(self) -> None:
        """An expired document can't be read, listed or a guard; a write expects version 0."""
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
            await assert_only(store, {TASK: (2, {"n": 2})}, position=2)

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
            await assert_only(store, {}, position=0)
