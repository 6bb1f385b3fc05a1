"""Persistence: the content of a store that is opened again, and its files."""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.protocols import Commit, Event, Write
from orchestrator.testing.store_contract.suite import (
    COMPACTED_LOG,
    OTHER_TASK,
    TASK,
    StoreSuite,
    make_commit,
    make_dump,
    read_dump,
)


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
