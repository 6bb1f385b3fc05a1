"""Copies: dump a store and load it into an empty one."""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import anyio
import pytest

from orchestrator.errors import HistoryCompacted, InvalidDocument, RefusedError
from orchestrator.protocols import Commit, CommitRecord, DumpedCommit, Event, Guard, Write
from orchestrator.testing.store_contract.suite import (
    COMPACTED_LOG,
    LEASE,
    OTHER_TASK,
    TASK,
    TIMEOUT,
    StoreSuite,
    assert_only,
    make_commit,
    make_dump,
    read_dump,
    watch,
)


class CopyContract(StoreSuite):
    """The rules for dumping and loading."""

    async def test_loaded_copy_equals_the_original_at_every_position(self) -> None:
        """Positions, times, authors, versions, expiries, events and deletions are equal."""
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
            assert await watch(copy, 0, 6) == await watch(store, 0, 6)
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
                await watch(store, 5, 1)
            state = await store.at(6)
            assert (state.position, state.time) == (6, 1e9 - 9)
            assert {key: (one.version, one.value, one.expires) for key, one in state.documents.items()} == {
                TASK: (3, {"n": 3.5}, 2e9)
            }
            assert [(one.position, one.time, one.writer) for one in await watch(store, 6, 2)] == [
                (7, 1e9 + 1, "bob@box:2"), (8, 1e9 + 2, "bob@box:2"),
            ]  # fmt: skip
            history = await store.history(TASK)
            assert [(one.version, one.value) for one in history] == [(4, {"n": "ü"}), (3, {"n": 3.5}), (2, {"n": 2})]
            assert list(history[2].events) == [Event("two", {"n": 2**70})]
            assert await store.get(TASK) is None  # expired
            await store.commit(Commit([Write(OTHER_TASK, 0, {}), Write(TASK, 0, {})]))
            assert [one.version for one in await store.list("task")] == [5, 5]
            assert await store.position() == 9

    async def test_copy_without_remaining_history_is_loaded(self) -> None:
        """There need not be any commit after the compacted ones."""
        async with self.open_store() as store:
            await store.load(make_dump(COMPACTED_LOG[:3], 6, 6))
            assert await read_dump(store) == (6, 6, list(COMPACTED_LOG[:3]))
            assert (await store.at(6)).documents.keys() == {TASK}
            assert await store.commit(Commit(events=[Event("next")])) == 7
            assert [one.position for one in await watch(store, 6, 1)] == [7]
            assert (await store.verify()).is_valid

    async def test_dump_excludes_later_commits(self) -> None:
        """Commits made while the dump is open are not part of it and need not wait."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            with anyio.fail_after(TIMEOUT):
                async with store.dump() as dump:
                    await store.commit(make_commit(TASK, 1, {"n": 2}))
                    assert (dump.position, dump.first) == (1, 0)
                    assert [commit.position async for commit in dump.commits] == [1]
            assert [commit.position for commit in (await read_dump(store))[2]] == [1, 2]

    async def test_empty_store_is_copied(self) -> None:
        """The copy is also empty."""
        async with self.open_store() as store, self.open_store() as copy:
            async with store.dump() as dump:
                await copy.load(dump)
            assert await read_dump(copy) == (0, 0, [])
            assert await copy.commit(make_commit(TASK, 0, {})) == 1

    async def test_load_into_a_used_store_is_refused(self) -> None:
        """Committed data is never replaced."""
        async with self.open_store() as store:
            await store.commit(make_commit(TASK, 0, {"n": 1}))
            with pytest.raises(RefusedError):
                await store.load(make_dump(COMPACTED_LOG, 8, 6))
            await assert_only(store, {TASK: (1, {"n": 1})}, position=1)

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
                seen.extend(await watch(store, 0, 2))

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
                    await watch(store, 0, 1)
                gone.set()

            with anyio.fail_after(TIMEOUT):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(expect_gone)
                    await anyio.lowlevel.checkpoint()
                    await store.load(make_dump(COMPACTED_LOG, 8, 6))
                    await gone.wait()
