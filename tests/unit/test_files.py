"""Atomic writes, and background tasks of a block."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from orchestrator.repo.git.stale_files import list_locks, list_partial_objects
from orchestrator.system import untrusted_files
from orchestrator.system.background import run_in_background
from orchestrator.system.files import StagedFile, atomic_write, opened


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("is_locked", [True, False])
def test_atomic_write_over_existing_file_replaces_it(tmp_path: Path, *, durable: bool, is_locked: bool) -> None:
    """With exactly the given mode, regardless of the umask; no temporary file remains."""
    path = tmp_path / "file"
    path.write_text("old")
    before = os.umask(0o077)
    try:
        atomic_write(path, "new", mode=0o644, durable=durable, is_locked=is_locked)
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_atomic_write_without_replace_keeps_existing_file(tmp_path: Path) -> None:
    """The first writer wins."""
    path = tmp_path / "file"
    atomic_write(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        atomic_write(path, b"second", replace=False)
    assert path.read_bytes() == b"first"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_atomic_write_into_missing_folder_changes_nothing(tmp_path: Path) -> None:
    """The system's error is raised."""
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "file", "x")
    assert not list(tmp_path.iterdir())


def test_atomic_write_with_lock_reuses_leftover_of_killed_process(tmp_path: Path) -> None:
    """The temporary file has a fixed name and may have any content."""
    (tmp_path / "file.new").write_text("a longer leftover")
    atomic_write(tmp_path / "file", "x", is_locked=True)
    assert (tmp_path / "file").read_text() == "x"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_staged_file_when_discarded_keeps_the_old_content(tmp_path: Path) -> None:
    """Readers never see a part of the new content."""
    path = tmp_path / "file"
    path.write_text("old")
    staged = StagedFile(path)
    staged.file.write(b"half")
    staged.discard()
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def append(path: Path, data: bytes) -> None:
    """Append data through a descriptor."""
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        while data:
            data = data[os.write(fd, data) :]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: atomic_write(path, "x" * 5000),
        lambda path: append(path, b"x" * 5000),
        lambda path: untrusted_files.write_file(path.parent, path.name, b"x" * 5000),
    ],
    ids=["atomic_write", "opened", "untrusted_files"],
)
def test_error_of_a_call_on_a_descriptor_names_the_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """The system names none: a real limit of the size of files makes the write fail."""
    path = tmp_path / "file"
    path.touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(path)
    assert path.stat().st_size <= 1000


async def test_background_task_after_failed_block_is_cancelled_and_error_is_unchanged() -> None:
    """The error is not wrapped in an exception group."""
    ended = anyio.Event()

    async def wait_forever() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    async def fail() -> None:
        async with run_in_background(wait_forever, grace=60, grace_after_error=0):
            await anyio.wait_all_tasks_blocked()
            raise KeyError("why")

    with pytest.raises(KeyError, match="why"):
        await fail()
    assert ended.is_set()


async def test_background_task_within_grace_period_completes() -> None:
    go, done = anyio.Event(), anyio.Event()

    async def finish() -> None:
        await go.wait()
        await anyio.wait_all_tasks_blocked()
        done.set()

    async with run_in_background(finish, grace=10):
        go.set()
    assert done.is_set()


def test_git_locks_are_listed_while_git_removes_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git removes the empty folders of a deleted ref, perhaps between the listing of their parent and their own."""
    refs, objects = tmp_path / "refs" / "heads" / "run", tmp_path / "objects"
    gone = [refs / "task", objects / "ab"]
    for folder in (*gone, refs / "other", objects / "cd"):
        folder.mkdir(parents=True)
    lock, partial = refs / "other" / "1.lock", objects / "cd" / "tmp_obj_1"
    lock.touch()
    partial.touch()
    list_folder = os.scandir

    def list_after_removal(folder: str | Path) -> object:
        if Path(folder) in gone and Path(folder).exists():
            Path(folder).rmdir()
        return list_folder(folder)

    monkeypatch.setattr(os, "scandir", list_after_removal)
    assert [one.path for one in list_locks(tmp_path)] == [lock]
    assert [one.path for one in list_partial_objects(tmp_path)] == [partial]
    assert not any(folder.exists() for folder in gone)
