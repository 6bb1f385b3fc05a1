"""The process that scans large checkouts returns the same as a scan in this process."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import psutil
import pytest

from orchestrator.repo.git.index_file import refresh_index_stats
from orchestrator.repo.worktrees.files import scan_process
from orchestrator.repo.worktrees.files.change_detection import TreeDiff, TreeSnapshot
from orchestrator.repo.worktrees.files.scan_process import FileScanner
from orchestrator.system import process

MANY = 100_000


def walkers() -> list[psutil.Process]:
    """Return our scan processes."""
    return [
        one
        for one in psutil.Process().children()
        if "orchestrator.repo.worktrees.files.scan_worker" in " ".join(one.cmdline())
    ]


@pytest.fixture
def stamps(tmp_path: Path) -> TreeSnapshot:
    """Return stamps of a folder with a non-UTF-8 file name, and a file written since."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in (b"same", b"written", b"odd \xff"):
        (tree / os.fsdecode(name)).touch()
    stamps = TreeSnapshot.capture(tree)
    assert stamps is not None
    (tree / "written").write_text("x")
    (tree / os.fsdecode(b"new \xff")).touch()
    return stamps


async def test_scan_process_finds_the_same_changes(stamps: TreeSnapshot) -> None:
    """One process answers all requests, and ends with the body."""
    async with FileScanner.open() as walker:
        for _ in range(2):
            found = await walker.run(stamps.compare, MANY)
            assert found == stamps.compare() == TreeDiff(["written"], [], [os.fsdecode(b"new \xff")], ["/"])
        (process,) = walkers()
    assert not process.is_running()


async def test_few_files_start_no_process(stamps: TreeSnapshot) -> None:
    """A thread is enough."""
    async with FileScanner.open() as walker:
        assert await walker.run(stamps.compare, 3) == stamps.compare()
        assert walkers() == []


async def test_dead_scan_process_is_replaced(stamps: TreeSnapshot) -> None:
    """A thread of this process answers, and the next request starts another process."""
    async with FileScanner.open() as walker:
        await walker.run(stamps.compare, MANY)
        (first,) = walkers()
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert await walker.run(stamps.compare, MANY) == stamps.compare()
        assert walkers() == []
        assert await walker.run(stamps.compare, MANY) == stamps.compare()
        assert walkers() != [first]


async def test_hanging_scan_process_is_abandoned(stamps: TreeSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a timeout a thread of this process answers, and the process is killed."""
    monkeypatch.setattr(scan_process, "_EXIT_TIMEOUT", 0.01)
    async with FileScanner.open() as walker:
        await walker.run(stamps.compare, MANY)
        (first,) = walkers()
        first.suspend()
        monkeypatch.setattr(scan_process, "_LIMIT", 0.01)
        assert await walker.run(stamps.compare, MANY) == stamps.compare()
        assert walkers() == []


@pytest.mark.parametrize("said", ["Fatal Python error: init_fs_encoding", "Could not find libraries", ""])
async def test_invalid_answer_is_not_used(stamps: TreeSnapshot, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """Whatever a broken interpreter prints, a thread of this process answers."""
    argv = ["sh", "-c", f"echo {said!r}"]
    monkeypatch.setattr(process, "internal_program", lambda *_: (argv, dict(os.environ)))
    async with FileScanner.open() as walker:
        assert await walker.run(stamps.compare, MANY) == stamps.compare()


def test_unwritable_index_stays_unchanged(tmp_path: Path) -> None:
    """The caller can then have git check it."""
    for arguments in (("init", "--quiet"), ("add", "file")):
        (tmp_path / "file").write_text("x")
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    index = tmp_path / ".git/index"
    before = index.read_bytes()
    index.with_name("index.fitted").mkdir()
    with pytest.raises(IsADirectoryError):
        refresh_index_stats(index, tmp_path)
    assert index.read_bytes() == before
    index.with_name("index.fitted").rmdir()
    assert refresh_index_stats(index, tmp_path)
    assert index.read_bytes() != before


async def test_error_is_raised_from_a_thread(tmp_path: Path) -> None:
    async with FileScanner.open() as walker:
        with pytest.raises(FileNotFoundError):
            await walker.run(partial(os.stat, tmp_path / "missing"), MANY)
        assert await walker.run(partial(os.path.exists, tmp_path), MANY) is True
