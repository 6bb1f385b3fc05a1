"""What sessions must leave alone in the user's repository: refs, configuration, hooks, HEADs and staged entries.

A `RepositorySnapshot` is a snapshot of these. Most looks find nothing new, so a part whose files have the same inodes, times and
sizes as in an earlier seal is taken over from it; only the others are read. Nothing is ever written there.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.source.user_checkouts import LocalRepository, list_checkout_git_dirs, read_heads
from orchestrator.system.process_table import process_ids, process_stat

#: Nanoseconds within which a file system may give two writes the same time: what is younger is read again.
_TIMESTAMP_GRANULARITY = 2_000_000_000
_FILES = ("config", "info/attributes", "info/exclude")

_Signature = tuple[tuple[str, int, int, int, int, int], ...]
_Content = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Part:
    signature: _Signature | None
    """What its files look like from without; None if they are too young to tell by that."""
    content: _Content


@dataclass(frozen=True, slots=True)
class RepositorySnapshot:
    """What the repository was like at one moment; made by `take`, compared by `changes`."""

    refs: _Part
    files: _Part
    heads: _Part
    """By the git directory of each checkout, relative to the shared one: `ref: …` or a commit."""
    indexes: Mapping[str, _Part]
    """By the same: a digest of the staged entries, without what `git status` refreshes."""


async def take_snapshot(
    repository: LocalRepository, git: Git, previous: RepositorySnapshot | None = None
) -> RepositorySnapshot:
    """Look at a repository, reading only what differs from an earlier seal.

    `git` runs at the user's side (`users=True`). GitError where the repository can't be read.
    """
    folder = repository.git_dir
    found = await anyio.to_thread.run_sync(_signatures, folder)

    async def part(
        before: _Part | None, signature: _Signature | None, read: Callable[[], Awaitable[_Content]]
    ) -> _Part:
        if before is not None and signature is not None and signature == before.signature:
            return before
        return _Part(signature, await read())

    async def read_refs() -> _Content:
        return await _read_refs(folder, git)

    async def read_files() -> _Content:
        return await anyio.to_thread.run_sync(_read_files, folder)

    async def heads() -> _Content:
        return await anyio.to_thread.run_sync(read_heads, folder)

    indexes = {}
    for name, signature in found.indexes.items():

        async def read_index(checkout: str = name) -> _Content:
            return await _read_index(folder, checkout, git)

        indexes[name] = await part(previous.indexes.get(name) if previous else None, signature, read_index)
    return RepositorySnapshot(
        await part(previous.refs if previous else None, found.refs, read_refs),
        await part(previous.files if previous else None, found.files, read_files),
        await part(previous.heads if previous else None, found.heads, heads),
        indexes,
    )


def describe_changes(before: RepositorySnapshot, after: RepositorySnapshot, *, ours: Mapping[str, str]) -> list[str]:
    """Return what has changed between two seals, a sentence each.

    `ours` are the refs that landings moved meanwhile, with the commit of the newest. They are not reported if they
    are there, and neither are the staged entries where one of them is checked out, which move with it.
    """
    found = [
        _moved(ref, old, new)
        for ref, old, new in _differences(before.refs.content, after.refs.content)
        if new is None or ours.get(ref) != new
    ]
    found += [
        _moved(f"{_inside(name)}/HEAD", old, new)
        for name, old, new in _differences(before.heads.content, after.heads.content)
    ]
    for file, old, new in _differences(before.files.content, after.files.content):
        found.append(
            f".git/{printable_name(file)} {'appeared' if old is None else 'is gone' if new is None else 'changed'}"
        )
    for name in before.indexes.keys() & after.indexes.keys():
        moved = after.heads.content.get(name, "").removeprefix("ref: ") in ours
        if not moved and before.indexes[name].content != after.indexes[name].content:
            found.append(f"{_inside(name)}/index has other staged entries")
    return sorted(found)


async def is_user_git_running(repository: LocalRepository) -> bool:
    """Whether a git command that we did not start, directly or by a session, works in the repository now.

    Then what differs may be the user's own doing. Where there is no /proc (macOS) none can be seen.
    """
    return await anyio.to_thread.run_sync(_is_user_git_running, repository)


@dataclass(frozen=True, slots=True)
class _Signatures:
    refs: _Signature | None
    files: _Signature | None
    heads: _Signature | None
    indexes: Mapping[str, _Signature | None]


def _signatures(folder: Path) -> _Signatures:
    now = time.time_ns()

    def settled(paths: Iterator[Path]) -> _Signature | None:
        signature = tuple(_stat(path) for path in paths)
        return None if any(entry[4] > now - _TIMESTAMP_GRANULARITY for entry in signature) else signature

    checkouts = list_checkout_git_dirs(folder)
    return _Signatures(
        settled(_ref_files(folder)),
        settled(path for path, _ in _watched_files(folder)),
        settled(folder / name / "HEAD" for name in checkouts),
        {name: settled(iter([folder / name / "index"])) for name in checkouts},
    )


def _stat(path: Path) -> tuple[str, int, int, int, int, int]:
    try:
        facts = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return str(path), 0, 0, 0, 0, 0
    return str(path), facts.st_ino, facts.st_mode, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _ref_files(folder: Path) -> Iterator[Path]:
    """Yield all that refs are stored in: loose ones with their folders, packed ones, tables."""
    yield folder / "packed-refs"
    for root in ("refs", "reftable"):
        for place, folders, names in os.walk(folder / root):
            folders.sort()
            yield Path(place)
            yield from (Path(place, name) for name in sorted(names) if not name.endswith(".lock"))


def _watched_files(folder: Path) -> Iterator[tuple[Path, str]]:
    named = [*_FILES, *(f"hooks/{path.name}" for path in _entries(folder / "hooks"))]
    named += [f"{checkout}/config.worktree".removeprefix("./") for checkout in list_checkout_git_dirs(folder)]
    yield from ((folder / name, name) for name in named)


async def _read_refs(folder: Path, git: Git) -> _Content:
    listed = await git("for-each-ref", "--format=%(refname) %(objectname) %(symref)", cwd=folder)
    # By this alone: names of refs may have what Unicode takes for the end of a line.
    lines = listed.stdout.decode(errors="surrogateescape").split("\n")[:-1]
    return {ref: value.rstrip() for ref, value in (line.split(" ", 1) for line in lines)}


def _read_files(folder: Path) -> _Content:
    found = ((name, _digest(path)) for path, name in _watched_files(folder))
    return {name: digest for name, digest in found if digest is not None}


def _digest(path: Path) -> str | None:
    """Return what tells apart what is at a path and whether it can be run; None if nothing is."""
    try:
        if path.is_symlink():
            return f"-> {path.readlink()}"
        runs = bool(path.stat().st_mode & 0o111)
        return f"{runs} {hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else 'no file'}"
    except (FileNotFoundError, NotADirectoryError):
        return None


async def _read_index(folder: Path, checkout: str, git: Git) -> _Content:
    # Its tags (-v) show entries whose changes git was told not to see.
    env = {"GIT_DIR": str(folder / checkout)}
    listed = await git("ls-files", "--stage", "-v", "-z", "--full-name", cwd=folder, env=env, ok=(0, 128))
    return {"": "" if listed.returncode else hashlib.sha256(listed.stdout).hexdigest()}


def _differences(before: _Content, after: _Content) -> Iterator[tuple[str, str | None, str | None]]:
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)


def _inside(checkout: str) -> str:
    return ".git" if checkout == "." else f".git/{printable_name(checkout)}"


def _moved(name: str, old: str | None, new: str | None) -> str:
    if old is None:
        return f"{printable_name(name)} appeared at {_short(new)}"
    if new is None:
        return f"{printable_name(name)} is gone, it was at {_short(old)}"
    return f"{printable_name(name)} moved from {_short(old)} to {_short(new)}"


def _short(value: str | None) -> str:
    text = (value or "").removeprefix("ref: ")
    return text[:10] if len(text) >= 40 and "/" not in text else printable_name(text)


def _is_user_git_running(repository: LocalRepository) -> bool:
    folders = [repository.git_dir, *([repository.top] if repository.top else []), *_linked_tops(repository.git_dir)]
    working = [pid for pid in process_ids() if _is_git_in(pid, folders)]
    return any(not _is_ours(pid) for pid in working)


def _linked_tops(folder: Path) -> list[Path]:
    found = []
    for name in list_checkout_git_dirs(folder)[1:]:
        try:
            found.append(Path((folder / name / "gitdir").read_text().rstrip("\n")).parent)
        except OSError:
            continue
    return found


def _is_git_in(pid: int, folders: list[Path]) -> bool:
    try:
        # Every process of the machine is looked at around each session: without the path that pathlib would make of it.
        with open(f"/proc/{pid}/comm", "rb", 0) as file:
            if file.read(3) != b"git":
                return False
        where = Path("/proc", str(pid), "cwd").readlink()
    except OSError:  # it has ended, or is not ours
        return False
    return any(where.is_relative_to(folder) for folder in folders)


def _is_ours(pid: int) -> bool:
    """Whether we are among a process's parents; one that ended meanwhile did not change anything any more."""
    own = os.getpid()
    while pid > 1:
        if pid == own:
            return True
        stat = process_stat(pid)
        pid = 0 if stat is None else stat.parent
    return False
