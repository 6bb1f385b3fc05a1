"""The state is copied between this machine and a server with equal digests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from orchestrator.protocols import Commit, Dump, DumpedCommit, DumpedDocument, Event, Key, Store
from orchestrator.state.stores.file import FileStore
from orchestrator.state.transfer.copying import copy_store
from orchestrator.system.clock import SystemClock
from orchestrator.testing.store_contract.suite import make_dump
from tests.store_kinds import SERVERS
from tests.stores import open_store


async def digest(store: Store) -> str:
    """Return a checksum of everything in a store."""
    found = hashlib.sha256()
    async with store.dump() as dump:
        found.update(repr((dump.position, dump.first)).encode())
        async for commit in dump.commits:
            found.update(repr(commit).encode())
    return found.hexdigest()


def history(count: int) -> Dump:
    """Return a log of two kinds of documents, with deletions, expiries and events."""
    commits = list[DumpedCommit]()
    last = dict[Key, tuple[int, int]]()
    for position in range(1, count + 1):
        key = Key("task" if position % 3 else "lease", str(position % 700))
        version, previous = last.get(key, (0, 0))
        encoded = None if position % 11 == 0 else b'{"n":%d,"text":"%b"}' % (position, b"x" * (position % 500))
        expires = 4e9 + position if position % 13 == 0 and encoded else None
        documents = (DumpedDocument(key, version + 1, encoded, expires, previous),)
        commits.append(DumpedCommit(position, 1e9 + position, "ada@box:1", documents, (Event("e", {"n": position}),)))
        last[key] = version + 1, position
    return make_dump(commits, count)


@pytest.mark.parametrize(
    ("count", "kind", "other"),
    [
        (500, "redis", "redis"),
        pytest.param(500, "postgres", "postgres", marks=pytest.mark.extended),
        pytest.param(10_000, "redis", "postgres", marks=pytest.mark.extended),
        pytest.param(10_000, "postgres", "redis", marks=pytest.mark.slow),
    ],
)
async def test_copy_to_a_server_and_back_has_an_equal_digest(tmp_path: Path, count: int, kind: str, other: str) -> None:
    """Also after a compaction on the server, and between servers; the copies accept commits."""
    clock = SystemClock()
    async with (
        FileStore.open(tmp_path / "source", clock) as source,
        open_store(SERVERS[kind].empty_store_url()) as server,
        FileStore.open(tmp_path / "copy", clock) as copy,
        open_store(SERVERS[other].empty_store_url()) as again,
    ):
        await source.load(history(count))
        await copy_store(source, server)
        assert await digest(server) == await digest(source)
        await copy_store(server, copy)
        assert await digest(copy) == await digest(source)
        await server.compact(1e9 + count / 2, 1 << 40)
        await copy_store(server, again)
        assert await digest(again) == await digest(server) != await digest(source)
        assert (await again.verify()).is_valid
        for store in (server, copy, again):
            assert await store.commit(Commit(events=[Event("next")])) == count + 1
