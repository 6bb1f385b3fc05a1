"""The store under test, example commits and assertions of the store contract."""

# ruff: noqa: S101  this module is a test suite

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import ClassVar

import anyio

from orchestrator.protocols import (
    Commit,
    CommitRecord,
    Dump,
    DumpedCommit,
    DumpedDocument,
    Event,
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


class StoreSuite(ABC):
    """Opens the store under test."""

    is_persistent: ClassVar[bool] = True
    """Whether a store that is opened again has its content: override `open_store_at`."""
    is_local: ClassVar[bool] = False
    """Whether its data is in files on this machine, which `local_paths` must return."""

    @abstractmethod
    def open_store(self) -> AbstractAsyncContextManager[Store]:
        """Return a context manager that opens a new, empty store for one test."""

    def open_store_at(self, location: Path) -> AbstractAsyncContextManager[Store]:
        """Return a context manager that opens the store at a location.

        The location is a folder of one test; a store on a server can use its path as a name. The store is empty at
        first, and keeps its content when it is opened again.
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name}, {location}: override `open_store_at`, or set `is_persistent = False`")


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


async def assert_only(store: Store, documents: dict[Key, tuple[int, JsonObject]], position: int) -> None:
    """Assert that a store has exactly these documents and versions, and the position."""
    found = [document for kind in ("task", "lease") for document in await store.list(kind)]
    assert {document.key: (document.version, document.value) for document in found} == documents
    for key in (TASK, OTHER_TASK):
        document = await store.get(key)
        assert (document and (document.version, document.value)) == documents.get(key)
    assert await store.position() == position


async def watch(store: Store, after: int, count: int) -> list[CommitRecord]:
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
