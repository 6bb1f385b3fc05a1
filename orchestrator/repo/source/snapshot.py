"""Detect changes to parts of the user's repository that sessions must not touch.

These are refs, configuration, hooks, HEADs and staged entries. Most snapshots find no change, so parts whose files have
the same inodes, times and sizes as in an earlier snapshot are reused, and only the others are read. Nothing is written.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.source.user_checkouts import (
    LocalRepository,
    list_checkout_git_dirs,
    list_checkouts,
    list_git_processes,
    read_heads,
)
from orchestrator.system.process_table import process_stat

#: Nanoseconds within which a file system may give two writes the same time. Newer files are read again.
_TIMESTAMP_GRANULARITY = 2_000_000_000
_INDEX = "index of "  # followed by the git directory of its checkout
_FILES = ("config", "info/attributes", "info/exclude")

_Fingerprint = tuple[tuple[str, int, int, int, int, int], ...]
_Content = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Part:
    fingerprint: _Fingerprint | None
    """The metadata of its files; None if they are too new for the metadata to be conclusive."""
    content: _Content


@dataclass(frozen=True, slots=True)
class RepositorySnapshot:
    """The repository's state, for `take_snapshot` and `describe_changes`.

    The parts are `refs`, `files`, `heads` and one `_INDEX` part per checkout. `heads` has each HEAD (`ref: …` or a
    commit), keyed by git directory relative to the shared one. An `_INDEX` part has a digest of the staged entries
    without the data that `git status` refreshes.
    """

    parts: Mapping[str, _Part]

    def content(self, name: str) -> _Content:
        """Return the contents of a part."""
        return self.parts[name].content


async def take_snapshot(
    repository: LocalRepository, git: Git, previous: RepositorySnapshot | None = None
) -> RepositorySnapshot:
    """Take a snapshot; read only parts that differ from an earlier snapshot.

    `git` runs with the user's configuration (`as_user=True`). Raises GitError if the repository can't be read.
    """
    folder = repository.git_dir
    fingerprints = await anyio.to_thread.run_sync(_fingerprints, folder)
    before = {} if previous is None else previous.parts

    async def part(name: str) -> _Part:
        known, fingerprint = before.get(name), fingerprints[name]
        if known is not None and fingerprint is not None and fingerprint == known.fingerprint:
            return known
        return _Part(fingerprint, await _read_part(name, folder, git))

    return RepositorySnapshot({name: await part(name) for name in fingerprints})


async def _read_part(name: str, folder: Path, git: Git) -> _Content:
    match name:
        case "refs":
            return await _read_refs(folder, git)
        case "files":
            return await anyio.to_thread.run_sync(_read_files, folder)
        case "heads":
            return await anyio.to_thread.run_sync(read_heads, folder)
        case _:
            return await _read_index(folder, name.removeprefix(_INDEX), git)


def describe_changes(before: RepositorySnapshot, after: RepositorySnapshot, *, ours: Mapping[str, str]) -> list[str]:
    """Return the changes between two snapshots, one sentence each.

    `ours` are the refs that landings have moved in between, with their newest commits. A ref at that commit is not
    reported, nor are the staged entries of its checkouts, which move with the ref.
    """
    changes = [
        _moved(ref, old, new)
        for ref, old, new in _differences(before.content("refs"), after.content("refs"))
        if new is None or ours.get(ref) != new
    ]
    changes += [
        _moved(f"{_inside(name)}/HEAD", old, new)
        for name, old, new in _differences(before.content("heads"), after.content("heads"))
    ]
    for file, old, new in _differences(before.content("files"), after.content("files")):
        change = "created" if old is None else "deleted" if new is None else "changed"
        changes.append(f".git/{printable_name(file)} was {change}")
    for part in before.parts.keys() & after.parts.keys():
        name = part.removeprefix(_INDEX)
        moved = after.content("heads").get(name, "").removeprefix("ref: ") in ours
        if name != part and not moved and before.content(part) != after.content(part):
            changes.append(f"{_inside(name)}/index has different staged entries")
    return sorted(changes)


async def is_user_git_running(repository: LocalRepository) -> bool:
    """Return whether a git command that is not ours is running in the repository.

    If so, changes may be the user's. Commands of sessions do not count. Without /proc (macOS), commands can't be
    detected.
    """
    return await anyio.to_thread.run_sync(_is_user_git_running, repository)


def _fingerprints(folder: Path) -> dict[str, _Fingerprint | None]:
    now = time.time_ns()

    def stable_fingerprint(paths: Iterator[Path]) -> _Fingerprint | None:
        fingerprint = tuple(_stat(path) for path in paths)
        return None if any(entry[4] > now - _TIMESTAMP_GRANULARITY for entry in fingerprint) else fingerprint

    checkouts = list_checkout_git_dirs(folder)
    return {
        "refs": stable_fingerprint(_ref_files(folder)),
        "files": stable_fingerprint(path for path, _ in _watched_files(folder)),
        "heads": stable_fingerprint(folder / name / "HEAD" for name in checkouts),
        **{f"{_INDEX}{name}": stable_fingerprint(iter([folder / name / "index"])) for name in checkouts},
    }


def _stat(path: Path) -> tuple[str, int, int, int, int, int]:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return str(path), 0, 0, 0, 0, 0
    return str(path), status.st_ino, status.st_mode, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _ref_files(folder: Path) -> Iterator[Path]:
    """Yield all files that store refs: loose refs, folders, packed refs, reftables."""
    yield folder / "packed-refs"
    for root in ("refs", "reftable"):
        for path, folders, names in os.walk(folder / root):
            folders.sort()
            yield Path(path)
            yield from (Path(path, name) for name in sorted(names) if not name.endswith(".lock"))


def _watched_files(folder: Path) -> Iterator[tuple[Path, str]]:
    named = [*_FILES, *(f"hooks/{path.name}" for path in _entries(folder / "hooks"))]
    named += [f"{checkout}/config.worktree".removeprefix("./") for checkout in list_checkout_git_dirs(folder)]
    yield from ((folder / name, name) for name in named)


async def _read_refs(folder: Path, git: Git) -> _Content:
    listed = await git("for-each-ref", "--format=%(refname) %(objectname) %(symref)", cwd=folder)
    # Not splitlines: ref names may contain Unicode line separators.
    lines = listed.stdout.decode(errors="surrogateescape").split("\n")[:-1]
    return {ref: value.rstrip() for ref, value in (line.split(" ", 1) for line in lines)}


def _read_files(folder: Path) -> _Content:
    digests = ((name, _digest(path)) for path, name in _watched_files(folder))
    return {name: digest for name, digest in digests if digest is not None}


def _digest(path: Path) -> str | None:
    """Return a digest of a file's content and executable bit, or None if missing."""
    try:
        if path.is_symlink():
            return f"-> {path.readlink()}"
        is_executable = bool(path.stat().st_mode & 0o111)
        return f"{is_executable} {hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else 'no file'}"
    except (FileNotFoundError, NotADirectoryError):
        return None


async def _read_index(folder: Path, checkout: str, git: Git) -> _Content:
    # Include tags (-v), which show entries whose changes git is configured to ignore.
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
        return f"{printable_name(name)} was created at {_short(new)}"
    if new is None:
        return f"{printable_name(name)} was deleted (was at {_short(old)})"
    return f"{printable_name(name)} moved from {_short(old)} to {_short(new)}"


def _short(value: str | None) -> str:
    text = (value or "").removeprefix("ref: ")
    return text[:10] if len(text) >= 40 and "/" not in text else printable_name(text)


def _is_user_git_running(repository: LocalRepository) -> bool:
    return not all(map(_is_ours, list_git_processes([repository.git_dir, *list_checkouts(repository)])))


def _is_ours(pid: int) -> bool:
    """Return whether we are an ancestor of a process; False if the process has exited."""
    own = os.getpid()
    while pid > 1:
        if pid == own:
            return True
        stat = process_stat(pid)
        pid = 0 if stat is None else stat.parent
    return False
