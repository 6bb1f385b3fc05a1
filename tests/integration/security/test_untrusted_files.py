"""An agent swaps files that we read and write with links, as fast as it can: no access leaves its folder."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from orchestrator.project import LEGACY_TREE, Project
from orchestrator.protocols import SessionHome
from orchestrator.repo.intake.session_refs import read_session_refs
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.setup.adapter_homes import _copy_back, _write_content
from orchestrator.sessions.setup.handoff_file import HandoffData, _read
from orchestrator.state.legacy.files import read_legacy_files
from orchestrator.system import untrusted_files

CANARY = "canary-4f1d"
#: Swaps two paths by renameat2 with RENAME_EXCHANGE until it is ended; restores a removed link.
EXCHANGE = """
import ctypes, os, sys
one, two = (os.fsencode(path) for path in sys.argv[1:])
target = os.readlink(two) if os.path.islink(two) else None
libc = ctypes.CDLL(None, use_errno=True)
if libc.renameat2(-100, one, -100, two, 2):
    sys.exit(os.strerror(ctypes.get_errno()))
print("ready", flush=True)
while True:
    if libc.renameat2(-100, one, -100, two, 2):
        for path in one, two:
            try:
                os.symlink(target, path)
            except FileExistsError:
                pass
"""
SECONDS = 0.25

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")


@contextmanager
def exchanging(one: Path, two: Path) -> Iterator[None]:
    """Swap two paths continuously in a process during the body."""
    argv = [sys.executable, "-I", "-S", "-c", EXCHANGE, str(one), str(two)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            assert (said := process.stdout.readline()) == "ready\n", said
            yield
            assert process.poll() is None
        finally:
            process.kill()


def repeat(what: Callable[[], None], is_enough: Callable[[], bool] = lambda: True) -> int:
    """Repeat for a quarter of a second, or longer on a busy machine; return the count."""
    count, end = 0, time.monotonic() + SECONDS
    while time.monotonic() < end or count <= 20 or not is_enough():
        what()
        count += 1
    return count


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Return a folder of the user with a secret that no session may see."""
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("exchanged", ["file", "folder", "pipe"])
def test_read_during_a_link_exchange_stays_in_the_folder(tmp_path: Path, outside: Path, exchanged: str) -> None:
    """Neither by the last component nor by an earlier one; a pipe does not block."""
    top = tmp_path / "top"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "file").write_text("own")
    (outside / "file").write_text(CANARY)
    if exchanged == "file":
        one = top / "a" / "b" / "file"
        (top / "link").symlink_to(outside / "file")
    elif exchanged == "folder":
        one = top / "a" / "b"
        (top / "link").symlink_to(outside)
    else:
        one = top / "a" / "b" / "file"
        os.mkfifo(top / "link")
    seen: set[str] = set()

    def read() -> None:
        with suppress(OSError):
            seen.add(untrusted_files.read_file(top, "a/b/file", 100).decode())

    with exchanging(one, top / "link"):
        repeat(read)
    assert seen == {"own"}


def test_write_during_a_link_exchange_stays_in_the_folder(tmp_path: Path, outside: Path) -> None:
    """No file of the user is changed, created or removed."""
    top = tmp_path / "top"
    (top / "a").mkdir(parents=True)
    (outside / "file").write_text(CANARY)
    (top / "link").symlink_to(outside)

    def write() -> None:
        with suppress(OSError):
            untrusted_files.write_file(top, "a/file", b"ours")
        with suppress(OSError):
            untrusted_files.make_link(top, "a/login", top)
        with suppress(OSError):
            untrusted_files.remove_file(top, "a/login")

    with exchanging(top / "a", top / "link"):
        repeat(write)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == CANARY


def test_link_in_place_of_a_file_is_replaced(tmp_path: Path, outside: Path) -> None:
    """So is a link in place of a parent folder."""
    (outside / "file").write_text(CANARY)
    (tmp_path / "link").symlink_to(outside / "file")
    (tmp_path / "folder").symlink_to(outside)
    untrusted_files.write_file(tmp_path, "link", b"ours")
    untrusted_files.write_file(tmp_path, "folder/file", b"ours")
    assert (outside / "file").read_text() == CANARY
    assert (tmp_path / "link").read_text() == (tmp_path / "folder" / "file").read_text() == "ours"


def test_only_plain_relative_paths_are_accepted(tmp_path: Path) -> None:
    """No absolute path, and none with `..` or `.`."""
    (tmp_path / "top").mkdir()
    (tmp_path / "file").write_text(CANARY)
    for path in ("../file", "/etc/passwd", "a/../../file", "", "./file", "a//b"):
        with pytest.raises(OSError, match="not a plain relative path"):
            untrusted_files.read_file(tmp_path / "top", path, 100)


def test_irregular_file_is_rejected(tmp_path: Path) -> None:
    """A folder, a link, a device; a hard-linked file where that matters; a file that is too large."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("12345")
    for path in ("folder", "link", "none"):
        with pytest.raises(OSError, match=path):
            untrusted_files.read_file(tmp_path, path, 100)
    with pytest.raises(OSError, match="large"):
        untrusted_files.read_file(tmp_path, "file", 4)
    assert untrusted_files.read_file(tmp_path, "file", 5, sole=True) == b"12345"
    os.link(tmp_path / "file", tmp_path / "other")
    with pytest.raises(OSError, match="links"):
        untrusted_files.read_file(tmp_path, "file", 5, sole=True)
    assert untrusted_files.file_type(tmp_path, "link") == stat.S_IFLNK
    assert untrusted_files.file_type(tmp_path, "link/x") is None


def _worktree(tmp_path: Path) -> Worktree:
    worktree = Worktree(Hub(tmp_path / "hub"), "run-1", "a", 1)
    (worktree.git_dir / "refs" / "heads").mkdir(parents=True)
    worktree.handoff_file.parent.mkdir()
    return worktree


def test_refs_are_not_read_through_an_exchanged_link(tmp_path: Path, outside: Path) -> None:
    worktree, theirs = _worktree(tmp_path), "c" * 40
    own = worktree.git_dir / "refs" / "heads"
    (own / "own").write_text("a" * 40)
    (outside / "theirs").write_text(theirs)
    (worktree.git_dir / "link").symlink_to(outside)
    seen: set[str] = set()
    with exchanging(own, worktree.git_dir / "link"):
        repeat(lambda: seen.update(read_session_refs(worktree.git_dir).refs.values()), lambda: "a" * 40 in seen)
    assert seen == {"a" * 40}


def test_handoff_is_not_read_through_an_exchanged_link(tmp_path: Path, outside: Path) -> None:
    worktree = _worktree(tmp_path)
    file = worktree.handoff_file
    file.write_text('{"own": 1}')
    (outside / "session.json").write_text(json.dumps({"token": CANARY}))
    file.with_name("link").symlink_to(outside / "session.json")
    seen: set[str] = set()

    def read() -> None:
        found = _read(worktree)
        seen.add(json.dumps(found.data) if isinstance(found, HandoffData) else "")

    with exchanging(file, file.with_name("link")):
        repeat(read, lambda: '{"own": 1}' in seen)
    assert seen <= {'{"own": 1}', ""}


def test_login_is_not_copied_through_an_exchanged_link(tmp_path: Path, outside: Path) -> None:
    """Otherwise the next session could read any file of the user as the login."""
    folder, login = tmp_path / "home", outside / "login.json"
    folder.mkdir()
    (outside / "key").write_text(CANARY)
    (folder / "dir").mkdir()
    (folder / "link").symlink_to(outside)
    what = SessionHome(links={"dir/key": str(login)}, renewed=("dir/key",))
    seen: set[str] = set()

    def bring() -> None:
        login.write_text("login")
        with suppress(OSError):
            _copy_back(folder, what, {})
        seen.add(login.read_text())

    with exchanging(folder / "dir", folder / "link"):
        repeat(bring)
    assert seen == {"login"}
    assert (outside / "key").read_text() == CANARY


def test_settings_are_not_written_through_an_exchanged_link(tmp_path: Path, outside: Path) -> None:
    """No file of the user is replaced, and no login is linked into a folder of the user."""
    folder, login = tmp_path / "home", tmp_path / "login.json"
    (folder / "dir").mkdir(parents=True)
    login.write_text("login")
    (outside / "settings.json").write_text(CANARY)
    (folder / "link").symlink_to(outside)
    what = SessionHome(files={"dir/settings.json": "ours"}, links={"dir/login": str(login)})

    def furnish() -> None:
        with suppress(OSError):
            _write_content(folder, what, {})

    with exchanging(folder / "dir", folder / "link"):
        repeat(furnish)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"settings.json": CANARY}


def test_legacy_state_is_not_read_through_an_exchanged_link(tmp_path: Path, outside: Path) -> None:
    """A link within the project is followed; one that leads out during the read gives nothing."""
    project = Project(tmp_path / "project")
    sessions = project.top / LEGACY_TREE / "sessions"
    sessions.mkdir(parents=True)
    project.folder.mkdir()
    (sessions / "one.json").write_text("own")
    (outside / "one.json").write_text(CANARY)
    (sessions.parent / "link").symlink_to(outside)

    def read() -> None:
        with suppress(OSError):
            read_legacy_files(project)

    with exchanging(sessions, sessions.parent / "link"):
        repeat(read)
    kept = [path.read_text() for path in project.legacy.iterdir()] if project.legacy.is_dir() else []
    assert not any(CANARY in text for text in kept)
