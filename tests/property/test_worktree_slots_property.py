"""A cleaned worktree slot equals a fresh checkout byte for byte, after any session."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import GitError
from orchestrator.repo.git.command import Git, sealed_environment
from orchestrator.repo.worktrees import reset, worktrees
from orchestrator.repo.worktrees.checkouts import HeldSlot, SlotOptions
from orchestrator.repo.worktrees.files.change_detection import TreeDiff
from orchestrator.repo.worktrees.pool import SlotPool
from orchestrator.repo.worktrees.reset import KeepRules, SlotContents
from orchestrator.repo.worktrees.slots import WorktreeSlot
from tests.edits import rename, swap
from tests.hub_fixture import HubFixture

_LATIN = os.fsdecode(b"caf\xe9")
_FILES = ("a", "b.txt", "run", "link", "-dash", "new\nline", _LATIN, "sub/a", "sub/b.txt", "sub/deep/a", "sub/deep/c")
_MORE = ("other/a", "other/b", "other/deep/a", "out/.gitkeep", ".gitignore", ".gitattributes", "sub/.gitattributes")
_NEW = (
    "new",
    "x.log",
    "sub/new",
    "sub/x.log",
    "made/a",
    "made/deep/x.log",
    "out/new",
    "module/a",
    "cache",
    "sub/cache/a",
)
_FOLDERS = ("", "sub", "other", "sub/deep", "other/deep", "made", "out", "module", "sub/module", "cache", "sub/cache")
_EXTRA = (".venv/bin/python", ".venv/lib/x.py", "setup.out", ".venv", ".venv/lib/new.py", "empty/dir", "empty/dir/new")
_IDENTITY = ("-c", "user.name=A", "-c", "user.email=a@example.org")

Edit = Callable[[Path, str, str], None]
Steps = list[tuple[Edit, str, str]]
Facts = tuple[int, int, object, tuple[tuple[str, bytes], ...]]


@dataclass(frozen=True, repr=False)
class Commits:
    """The hub of a repository with two commits that differ in every possible way."""

    yard: HubFixture
    first: str
    second: str
    expected: dict[str, list[dict[str, Facts]]] = field(default_factory=dict)
    """The expected contents of a path of each kind, for each commit."""


# The edits. Those that are impossible in a slot are skipped.


def _write(top: Path, path: str, other: str) -> None:
    (top / path).parent.mkdir(parents=True, exist_ok=True)
    (top / path).write_text(f"text of {other!r}\n")


def _append(top: Path, path: str, _: str) -> None:
    with (top / path).open("a") as file:
        file.write("more\n")


def _rewrite(top: Path, path: str, _: str) -> None:
    """Write another content of the same size and restore the times."""
    before = (top / path).stat()
    (top / path).write_bytes((top / path).read_bytes()[::-1])
    os.utime(top / path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _map(top: Path, path: str, _: str) -> None:
    with (top / path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] ^= 1


def _copy_folder(top: Path, path: str, _: str) -> None:
    """Replace a folder with a copy of the same name."""
    if not path:
        return
    shutil.copytree(top / path, top / "copied", symlinks=True)
    shutil.rmtree(top / path)
    (top / "copied").rename(top / path)


def _turn_mode(top: Path, path: str, _: str) -> None:
    (top / path).chmod((top / path).stat().st_mode ^ 0o111)


def _open_mode(top: Path, path: str, _: str) -> None:
    (top / path).chmod(0o1777)


def _close_mode(top: Path, path: str, _: str) -> None:
    (top / path).chmod(0 if os.geteuid() == 0 or not (top / path).is_dir() else 0o700)


def _link(top: Path, path: str, other: str) -> None:
    (top / path).symlink_to(top / other)


def _relink(top: Path, path: str, other: str) -> None:
    (top / path).unlink()
    (top / path).symlink_to(other)


def _link_hard(top: Path, path: str, other: str) -> None:
    (top / path).hardlink_to(top / other)


def _link_out(top: Path, path: str, _: str) -> None:
    """Write through a hard link outside."""
    outside = top.parent / "tmp" / f"outside-{len(list((top.parent / 'tmp').iterdir()))}"
    outside.hardlink_to(top / path)
    with suppress(OSError):
        outside.write_text("from outside\n")


def _link_in(top: Path, path: str, _: str) -> None:
    """Replace a file with one from outside."""
    outside = top.parent / "tmp" / f"outside-{len(list((top.parent / 'tmp').iterdir()))}"
    outside.write_text("outside\n")
    (top / path).unlink(missing_ok=True)
    (top / path).hardlink_to(outside)


def _remove(top: Path, path: str, _: str) -> None:
    if (top / path) == top:
        return
    shutil.rmtree(top / path) if (top / path).is_dir() and not (top / path).is_symlink() else (top / path).unlink()


def _become_link(top: Path, path: str, other: str) -> None:
    (top / path).rename(top / "aside")
    (top / path).symlink_to("aside")


def _become_folder(top: Path, path: str, _: str) -> None:
    (top / path).unlink()
    (top / path / "deep").mkdir(parents=True)
    (top / path / "deep" / "x").write_text("x\n")


def _become_file(top: Path, path: str, _: str) -> None:
    _remove(top, path, _)
    (top / path).write_text("was a folder\n")


def _become_file_and_back(top: Path, path: str, _: str) -> None:
    _become_file(top, path, _)
    (top / path).unlink()
    (top / path).mkdir()


def _make_folder(top: Path, path: str, other: str) -> None:
    (top / path / "-made\n" / "deeper").mkdir(parents=True)


def _nest(top: Path, path: str, _: str) -> None:
    if not path:
        return  # the top is one already
    (top / path).mkdir(exist_ok=True)
    subprocess.run(["git", "init", "-q", str(top / path)], check=True, capture_output=True)
    subprocess.run(["git", "-C", str(top / path), *_IDENTITY, "commit", "-qm", "x", "--allow-empty"], check=True)


def _ignore(top: Path, path: str, _: str) -> None:
    with (top / ".gitignore").open("a") as file:
        file.write(f"/{path}\n")


def _attribute(top: Path, path: str, _: str) -> None:
    (top / path).mkdir(exist_ok=True)
    with (top / path / ".gitattributes").open("a") as file:
        file.write("* text eol=crlf\na ident\n")


def _pipe(top: Path, path: str, _: str) -> None:
    os.mkfifo(top / f"{path}.pipe")


def _socket(top: Path, path: str, _: str) -> None:
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(f"/proc/self/fd/{descriptor}/{len(path)}.socket")
    os.close(descriptor)


def _age(top: Path, path: str, _: str) -> None:
    os.utime(top / path, ns=(0, 0), follow_symlinks=False)


def _mark(top: Path, path: str, _: str) -> None:
    os.setxattr(top / path, "user.mark", b"1")


def _hand_down(top: Path, path: str, _: str) -> None:
    """Set a default access control list on a folder (acl(5); the kernel's posix_acl_xattr.h)."""
    entries = ((1, 7, -1), (2, 7, 1), (4, 7, -1), (16, 7, -1), (32, 7, -1))
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr(top / path, "system.posix_acl_default", value)


def _git(*args: str) -> Edit:
    def run(top: Path, path: str, _: str) -> None:
        given = [path or "." if one == "{}" else one for one in args]
        subprocess.run(["git", *_IDENTITY, *given], cwd=top, check=False, capture_output=True)

    return run


def _lose_git(top: Path, _: str, __: str) -> None:
    _remove(top, ".git", "")


def _own_git(top: Path, _: str, __: str) -> None:
    """Replace the `.git` file with a repository."""
    _remove(top, ".git", "")
    subprocess.run(["git", "init", "-q", str(top)], check=True, capture_output=True)


def _link_git(top: Path, path: str, _: str) -> None:
    _remove(top, ".git", "")
    (top / ".git").symlink_to(top / path)


_BY_GIT: tuple[Edit, ...] = (
    _git("add", "--all"),
    _git("commit", "-qam", "work"),
    _git("stash", "-u"),
    _git("rm", "-rq", "--cached", "{}"),
    _git("mv", "{}", "moved"),
    _git("clean", "-fdxq"),
    _git("checkout", "-q", "-f", "HEAD"),
    _git("checkout", "-q", "--", "{}"),
    _git("update-index", "--assume-unchanged", "{}"),
    _git("sparse-checkout", "set", "out"),
    _git("read-tree", "-u", "--reset", "--empty"),
    _git("config", "core.autocrlf", "true"),
)
_EDITS: tuple[Edit, ...] = (
    *(
        _write,
        _append,
        _rewrite,
        _map,
        rename,
        swap,
        _copy_folder,
        _turn_mode,
        _open_mode,
        _close_mode,
        _link,
        _relink,
    ),
    *(_link_hard, _link_out, _link_in, _remove, _become_link, _become_folder, _become_file, _become_file_and_back),
    *(_make_folder, _nest, _ignore, _attribute, _pipe, _socket, _age, _lose_git, _own_git, _link_git),
    *((_mark, _hand_down) if hasattr(os, "setxattr") else ()),
    *_BY_GIT,
)
_names = st.sampled_from((*_FILES, *_MORE, *_NEW, *_FOLDERS, *_EXTRA))
_steps = st.lists(st.tuples(st.sampled_from(_EDITS), _names, _names), min_size=1, max_size=6)
_kinds = st.sampled_from(("plain", "extras", "kept", "sparse"))


def _edit(top: Path, steps: Steps) -> None:
    for edit, path, other in steps:
        with suppress(OSError, ValueError, shutil.Error):
            edit(top, path, other)


# The repository and the expected contents.


@pytest.fixture(scope="module")
def commits() -> Iterator[Commits]:
    """Return the repository."""
    with TemporaryDirectory() as folder:
        yield anyio.run(_commits, Path(folder))


async def _commits(folder: Path) -> Commits:
    top = folder / "project"
    top.mkdir()

    def git(*args: str) -> str:
        done = subprocess.run(["git", *_IDENTITY, *args], cwd=top, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q", "-b", "main")
    for number, path in enumerate((*_FILES, *_MORE)):
        _write(top, path, f"{number}\n")
    (top / ".gitignore").write_text("*.log\ncache\n.venv/\n")
    (top / ".gitattributes").write_text("*.txt text eol=crlf\n")
    (top / "sub/.gitattributes").write_text("deep/c text eol=crlf\n")
    (top / "run").chmod(0o755)
    _relink(top, "link", "a")
    git("add", "--all"), git("commit", "-qm", "empty")
    for path in ("module", "sub/module"):
        git("update-index", "--add", "--cacheinfo", f"160000,{git('rev-parse', 'HEAD')},{path}")
    git("commit", "-qm", "first")
    for path in ("module", "sub/module"):
        (top / path).mkdir()
    yard = await HubFixture.of(top, folder / "home", sealed_environment(os.environ))
    first = await yard.fetch()
    for path in ("a", "b.txt", "sub/new/er"):
        _write(top, path, "changed")
    for path in ("sub/deep/a", "module"):
        _remove(top, path, "")
    _become_file(top, "other", "")
    _become_folder(top, _LATIN, "")
    _turn_mode(top, "run", "")
    _relink(top, "link", "-dash")
    (top / "sub/.gitattributes").write_text("c text\n")
    git("add", "--all"), git("commit", "-qm", "second")
    return Commits(yard, first, await yard.fetch())


def _facts(tree: Path, without: tuple[str, ...] = ()) -> dict[str, Facts]:
    """Return all properties of a folder's contents, except for times."""
    found, waiting = {"": _facts_of(tree)}, [""]
    while waiting:
        folder = waiting.pop()
        for path in (f"{folder}{name}" for name in os.listdir(tree / folder)):  # noqa: PTH208  names
            if path != ".git" and path not in without:
                found[path] = _facts_of(tree / path)
                if stat.S_ISDIR(found[path][0]):
                    waiting.append(f"{path}/")
    return found


def _facts_of(path: Path) -> Facts:
    status = path.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    content: object = None
    if stat.S_ISLNK(status.st_mode):
        content = str(path.readlink())
    elif stat.S_ISREG(status.st_mode):
        content = path.read_bytes()
    names = os.listxattr(path, follow_symlinks=False) if hasattr(os, "listxattr") else ()
    marks = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in sorted(names))
    return status.st_mode, 0 if is_folder else status.st_nlink, content, marks


async def _furnish(checkout: HeldSlot, _: str) -> tuple[str, ...]:
    tree = checkout.slot.tree
    if not checkout.contents.record.setup:
        for path in (".venv/bin/python", ".venv/lib/x.py", "setup.out", "cache/a"):
            _write(tree, path, path)
        (tree / "empty" / "dir").mkdir(parents=True)
    return ("made",)


def _options(kind: str) -> SlotOptions:
    care = SlotOptions(sparse=("sub", "out/") if kind == "sparse" else ())
    if kind in {"extras", "kept"}:
        care = replace(care, set_up=_furnish)
    return replace(care, keep=KeepRules((("cache", ""),))) if kind == "kept" else care


async def _expected(pool: SlotPool, commits: Commits, commit: str) -> dict[str, Facts]:
    """Return the contents of a fresh slot."""
    worktree, checkout = await commits.yard.begin(pool, "expected", commit)
    facts = _facts(checkout.slot.tree, ("cache",) if checkout.contents.record.kept else ())
    await worktrees.remove_session_folder(worktree)
    await pool.slots.discard(checkout)
    return facts


def _with_parents(path: str) -> set[str]:
    parts = path.split("/")
    return {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}


def _assert_found(found: TreeDiff | None, before: dict[str, Facts], after: dict[str, Facts]) -> None:
    """Assert that each difference, or a folder above it, is detected."""
    if found is None:
        return
    files, others = {*found.changed, *found.removed}, {path.rstrip("/") for path in (*found.added, *found.replaced)}
    touched = (
        {path.strip("/") for path in found.touched_folders} | others | {path.rstrip("/") for path in found.ambiguous}
    )
    for path in before.keys() | after.keys():
        if before.get(path) == after.get(path) or _with_parents(path) & others:
            continue
        was_folder = path in before and stat.S_ISDIR(before[path][0])
        assert path in (touched if was_folder else files) or (was_folder and path not in after), path


async def _clean(pool: SlotPool, checkout: HeldSlot, found: TreeDiff | None) -> SlotContents | None:
    if found is None:
        return None
    try:
        git = pool.slots.checkouts.git(checkout)
        return await reset.clean_slot(git, checkout.slot, checkout.contents, found, pool.slots.checkouts.options.keep)
    except (GitError, OSError):
        return None


async def _assert_clean(git: Git, place: WorktreeSlot, contents: SlotContents) -> None:
    """Assert that neither git nor the stamps find unknown changes."""
    assert contents.snapshot.compare() == TreeDiff(touched_folders=["/"])
    options = ("--porcelain", "-z", "--untracked-files=all", "--ignored")
    status = await git("status", *options, env=place.env, cwd=place.tree)
    entries = [line for line in os.fsdecode(status.stdout).split("\0") if line[1:2] != " "]
    others = {line[3:] for line in entries if line[:2] in {"??", "!!"}}
    assert len(entries) == len(others) + 1
    known = {*contents.record.extras, *contents.record.kept}
    assert {path for path in others if not _with_parents(path.rstrip("/")) & known} == set()
    changed = await git("diff-index", "--cached", "--name-only", contents.record.commit, env=place.env)
    assert not changed.stdout


async def _check(commits: Commits, kind: str, steps: Steps, more: Steps) -> bool:
    """Have two sessions edit a slot in turn; return whether it had to be discarded."""
    async with commits.yard.open(_options(kind)) as pool:
        if kind not in commits.expected:
            commits.expected[kind] = [await _expected(pool, commits, one) for one in (commits.first, commits.second)]
        first, second = commits.expected[kind]
        worktree, checkout = await commits.yard.begin(pool, "task", commits.first)
        place, git = checkout.slot, pool.slots.checkouts.git(checkout)
        try:
            before = _facts(place.tree, tuple(checkout.contents.record.kept))
            assert before == first
            _edit(place.tree, steps)
            edited, found = _facts(place.tree, tuple(checkout.contents.record.kept)), await checkout.compare()
            _assert_found(found, before, edited)
            await worktrees.remove_session_folder(worktree)
            contents = await _clean(pool, checkout, found)
            if contents is None:
                assert found is not None
                assert {*found.changed, *found.removed} & {*checkout.contents.record.extras}
                return True
            assert _facts(place.tree, tuple(contents.record.kept)) == first
            await _assert_clean(git, place, contents)
            moved = await reset.move_slot(git, place, contents, commits.second)
            assert moved is not None
            before = _facts(place.tree, tuple(moved.record.kept))
            assert before == second
            await _assert_clean(git, place, moved)
            _edit(place.tree, more)
            _assert_found(moved.snapshot.compare(), before, _facts(place.tree, tuple(moved.record.kept)))
        finally:
            shutil.rmtree(worktree.root, ignore_errors=True)
            await pool.slots.discard(checkout)
    return False


@pytest.mark.extended
@settings(max_examples=20)
@given(_kinds, _steps, _steps)
def test_slot_after_a_session_has_no_leftovers(commits: Commits, kind: str, steps: Steps, more: Steps) -> None:
    """After cleaning it equals a fresh slot, moves to another commit, and detects the next session's changes.

    It is discarded only if setup results changed.
    """
    anyio.run(partial(_check, commits, kind, steps, more))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=2000)
@given(_kinds, _steps, _steps)
def test_slot_after_many_sessions_has_no_leftovers(commits: Commits, kind: str, steps: Steps, more: Steps) -> None:
    """The same with many more examples."""
    anyio.run(partial(_check, commits, kind, steps, more))
