"""The file store within one process: privacy, rejections, and followers without polling."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from orchestrator.errors import StoreUnavailable
from orchestrator.protocols import Commit, CommitRecord, Event
from orchestrator.state.log.journal import Journal
from orchestrator.state.stores import file
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock


async def test_files_are_private(tmp_path: Path) -> None:
    """The directory is 0700 and each file in it 0600, whatever the umask allows."""
    directory = tmp_path / "new" / "state"
    before = os.umask(0)
    try:
        async with FileStore.open(directory, SystemClock()) as store:
            await store.commit(Commit(events=[Event("e")]))
    finally:
        os.umask(before)
    assert oct(directory.stat().st_mode & 0o777) == "0o700"
    assert {oct(path.stat().st_mode & 0o777) for path in directory.iterdir()} == {"0o600"}


async def test_unusable_folder_is_reported(tmp_path: Path) -> None:
    """A state directory that is a file is reported as unavailable, not as an internal error."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable):
        async with FileStore.open(tmp_path / "file", SystemClock()):
            pass


@pytest.mark.parametrize("what", ["folder", "lock"])
async def test_replaced_folder_is_written_by_new_openers_only(tmp_path: Path, what: str) -> None:
    """Through a replaced folder or lock file, a process that opened it before would lock another file."""
    folder, clock = tmp_path / "state", SystemClock()
    async with FileStore.open(folder, clock) as before:
        await before.commit(Commit(events=[Event("first")]))
        if what == "lock":
            (folder / "lock").unlink()
        else:
            folder.rename(tmp_path / "elsewhere")
            shutil.copytree(tmp_path / "elsewhere", folder)
        async with FileStore.open(folder, clock) as after:
            await after.commit(Commit(events=[Event("second")]))
            with pytest.raises(StoreUnavailable, match="moved or replaced"):
                await before.commit(Commit(events=[Event("never")]))
            with pytest.raises(StoreUnavailable, match="moved or replaced"), anyio.fail_after(10):
                async for _ in before.watch(2):
                    pass
            await after.commit(Commit(events=[Event("third")]))
            found = await after.verify()
            assert (found.is_valid, found.position) == (True, 3)


async def test_follower_is_woken_by_commits_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an hour between two polls, a commit of this process is still seen at once."""
    monkeypatch.setattr(file, "_POLL", 3600.0)
    async with FileStore.open(tmp_path, SystemClock()) as store, anyio.create_task_group() as tasks:

        async def answer() -> None:
            async for record in store.watch():
                if record.position % 2:
                    await store.commit(Commit(events=[Event("pong")]))

        tasks.start_soon(answer)
        with anyio.fail_after(10):
            await store.commit(Commit(events=[Event("ping")]))
            async for record in store.watch():
                if record.position == 20:
                    break
                if record.position % 2 == 0:
                    await store.commit(Commit(events=[Event("ping")]))
        tasks.cancel_scope.cancel()


async def test_killed_commit_is_complete_or_absent(tmp_path: Path) -> None:
    """If tasks are cancelled natively, past any shield, no two threads write at once and nothing is half done."""
    async with FileStore.open(tmp_path, SystemClock()) as store:
        for number in range(80):
            task = asyncio.ensure_future(store.commit(Commit(events=[Event("e", {"n": number})])))
            for _ in range(number % 8):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        end = await store.commit(Commit(events=[Event("last")]))
        records = [record async for record in _until(store, end)]
        assert [record.position for record in records] == list(range(1, end + 1))
        numbers = [event.data["n"] for record in records[:-1] for event in record.events]
        assert len(set(numbers)) == len(numbers)
        assert list(records[-1].events) == [Event("last")]
    async with FileStore.open(tmp_path, SystemClock()) as store:
        assert (await store.position(), list(store.damage)) == (end, [])


async def _until(store: FileStore, end: int) -> AsyncIterator[CommitRecord]:
    async for record in store.watch():
        yield record
        if record.position == end:
            return


async def test_follower_of_later_commits_starts_after_earlier_ones(tmp_path: Path) -> None:
    """Also after commits of other processes: otherwise each follower would read a large run again."""
    async with FileStore.open(tmp_path, SystemClock()) as store:
        await store.commit(Commit(events=[Event("earlier")]))
    journal = Journal(tmp_path, SystemClock(), file.SEGMENT_BYTES)
    journal.open()
    try:
        cursor = journal.log.open_cursor(1)
        assert cursor.offset == journal.end().end > 0
        cursor.close()
        cursor = journal.log.open_cursor(0)
        assert cursor.offset == 0
        cursor.close()
    finally:
        journal.close()
