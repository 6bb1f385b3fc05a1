"""Change detection by stamps finds the same changes as git, which reads every file."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.repo.worktrees.files.change_detection import TreeSnapshot
from tests.edits import rename, swap
from tests.hypothesis_settings import example_settings

_FILES = ("a", "b.txt", "sub/a", "sub/b", "sub/deep/a", "other/a", "other/b", "other/deep/a", "out/.gitkeep")
_PATHS = (*_FILES, "new", "x.log", "sub/new", "sub/x.log", "made/a", "made/deep/x.log", "out/new")
_FOLDERS = ("sub", "other", "sub/deep", "other/deep", "made", "out")
_MOST = 100


def _write(top: Path, path: str, text: str) -> None:
    (top / path).parent.mkdir(parents=True, exist_ok=True)
    (top / path).write_text(text)


def _rewrite(top: Path, path: str, _: str) -> None:
    """Write another content of the same size and restore the times."""
    before = (top / path).stat()
    (top / path).write_text("".join(reversed((top / path).read_text())))
    os.utime(top / path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _turn_mode(top: Path, path: str, _: str) -> None:
    (top / path).chmod((top / path).stat().st_mode ^ 0o100)


def _link(top: Path, path: str, other: str) -> None:
    (top / path).symlink_to(top / other)


def _link_hard(top: Path, path: str, other: str) -> None:
    (top / path).hardlink_to(top / other)


def _remove(top: Path, path: str, _: str) -> None:
    shutil.rmtree(top / path) if (top / path).is_dir() else (top / path).unlink()


def _become_link(top: Path, path: str, other: str) -> None:
    (top / path).rename(top / "aside")
    (top / path).symlink_to("aside")


def _nest(top: Path, path: str, _: str) -> None:
    (top / path).mkdir(exist_ok=True)
    subprocess.run(["git", "init", "-q", str(top / path)], check=True)


def _ignore(top: Path, path: str, _: str) -> None:
    with (top / ".gitignore").open("a") as file:
        file.write(f"/{path}\n")


_EDITS: tuple[Callable[[Path, str, str], None], ...] = (
    *(_write, _rewrite, rename, swap, _turn_mode, _link, _link_hard, _remove, _become_link, _ignore),
)
_names = st.sampled_from((*_PATHS, *_FOLDERS))
_steps = st.lists(st.tuples(st.sampled_from((*_EDITS, _nest)), _names, _names), min_size=1, max_size=6)


@contextmanager
def _checkout() -> Iterator[Path]:
    with TemporaryDirectory() as made:
        top = Path(made)
        for number, path in enumerate(_FILES):
            _write(top, path, f"text {number}\n")
        _write(top, ".gitignore", "*.log\n")
        _git(top, "init", "-q")
        _git(top, "add", "--all")
        yield top


def _git(top: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(top), *args], check=True, capture_output=True, text=True).stdout


def _by_git(top: Path, *paths: str) -> set[str]:
    """Return the changes found by git with an index rebuilt from the objects."""
    listed = _git(top, "ls-files", "--stage")
    (top / ".git" / "index").unlink()
    subprocess.run(["git", "-C", str(top), "update-index", "--index-info"], input=listed, check=True, text=True)
    found = _git(top, "status", "--porcelain", "--untracked-files=all", "--no-renames", "-z", "--", *paths)
    return {entry[3:] for entry in found.split("\0") if entry and entry[1] != " "}


@example_settings(60)
@given(_steps)
def test_changes_that_git_finds_are_detected(steps: list[tuple[Callable[[Path, str, str], None], str, str]]) -> None:
    """Git restricted to the detected paths finds all changes that a full scan finds."""
    with _checkout() as top:
        stamps = TreeSnapshot.capture(top)
        assert stamps is not None
        for edit, path, other in steps:
            with suppress(OSError):
                edit(top, path, other)
        found = stamps.compare()
        if found is not None and found.is_small(_MOST):
            named = [f":(literal){path}" for path in (*found.changed, *found.removed, *found.added)]
            assert (_by_git(top, *named) if named else set()) == _by_git(top)
