"""The user's own checkouts: where a branch is checked out, whether it is clean, and mending a cut-off update.

A push into a checked-out branch writes files, then the index, then the ref. A kill in between leaves the
earlier ones ahead of the later ones; `settle_checkout` brings all three back to one commit, and never touches a file
whose content is neither the old nor the new one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import GitError, RefusedError
from orchestrator.repo.git import Git


@dataclass(frozen=True, slots=True)
class LocalRepository:
    """A repository on this machine: its shared git directory, and the top of its checkout (None: bare)."""

    git_dir: Path
    top: Path | None
    object_format: str


async def inspect(path: Path, git: Git) -> LocalRepository:
    """Find the repository at or above a path; RefusedError where there is none that git will work with."""
    remedy = "set `repo` to the path or URL of a git repository that git accepts"

    async def ask(fact: str) -> str:
        return (await git("rev-parse", fact, cwd=path)).stdout.decode(errors="surrogateescape").rstrip("\n")

    try:
        bare = await ask("--is-bare-repository") == "true"
        common = await ask("--git-common-dir")
        object_format = await ask("--show-object-format")
        top = None if bare else Path(await ask("--show-toplevel"))
    except (GitError, NotADirectoryError, FileNotFoundError) as error:
        why = error.stderr if isinstance(error, GitError) else "there is no such folder"
        raise RefusedError(f"{path}: {why}", remedy) from None
    return LocalRepository(await anyio.to_thread.run_sync((path / common).resolve), top, object_format)


async def checkout_of(repository: LocalRepository, branch: str, git: Git) -> Path | None:
    """Return the folder in which a branch is checked out, in the main or a linked worktree of the user's."""
    listed = await git("worktree", "list", "--porcelain", "-z", cwd=repository.git_dir)
    for entry in listed.stdout.decode(errors="surrogateescape").split("\0\0"):
        facts = dict(line.partition(" ")[::2] for line in entry.split("\0"))
        if facts.get("branch") == f"refs/heads/{branch}" and "bare" not in facts:
            return Path(facts["worktree"])
    return None


async def changes_in(checkout: Path, git: Git) -> list[str]:
    """Return the tracked paths that differ from the checkout's commit, staged or not; reading changes nothing."""
    listed = await git(
        "status", "--porcelain", "-z", "--untracked-files=no", "--ignore-submodules=all", "--no-renames", cwd=checkout
    )
    return [entry[3:] for entry in listed.stdout.decode(errors="surrogateescape").split("\0")[:-1]]


async def settle_checkout(checkout: Path, branch: str, old: str, new: str, git: Git) -> list[str]:
    """Bring ref, index and files of a checkout to one commit after a push from `old` to `new` was cut off.

    Finishes the move with a compare-and-swap if files and index were ready, otherwise puts the files back.
    The caller holds proof that no process of that push lives, and has removed the locks that it left.
    Returns the paths that neither commit explains: somebody else wrote them, they are left as they are.
    """
    ref = f"refs/heads/{branch}"
    if (await git("rev-parse", "--verify", "--quiet", ref, cwd=checkout, ok=(0, 1))).stdout.decode().strip() != old:
        return []
    if (await git("cat-file", "-e", f"{new}^{{commit}}", cwd=checkout, ok=(0, 1, 128))).returncode:
        return []  # the commit never arrived: nothing was written
    if not (await git("diff-index", "--cached", "--quiet", new, cwd=checkout, ok=(0, 1))).returncode:
        await git("update-ref", "-m", "council: finish an interrupted landing", ref, new, old, cwd=checkout)
        return []
    return await _put_back(checkout, old, new, git)


async def _put_back(checkout: Path, old: str, new: str, git: Git) -> list[str]:
    before, after = await _blobs(git, checkout, old, new)
    ours, added, foreign = [], [], []
    for path in before.keys() | after.keys():
        match await _whose(git, checkout, path, before.get(path), after.get(path)):
            case "new" if path in before:
                ours.append(path)
            case "new":
                added.append(path)
            case "foreign":
                foreign.append(path)
    if ours:
        listed = "\0".join(ours).encode(errors="surrogateescape") + b"\0"
        await git("checkout-index", "--force", "-z", "--stdin", cwd=checkout, input_=listed)
    await anyio.to_thread.run_sync(_delete_added, checkout, added)
    return sorted(foreign)


def _delete_added(checkout: Path, paths: Sequence[str]) -> None:
    for path in paths:
        (checkout / path).unlink(missing_ok=True)
        for folder in Path(path).parents:
            if folder != Path() and not any((checkout / folder).iterdir()):
                (checkout / folder).rmdir()


async def _blobs(git: Git, checkout: Path, old: str, new: str) -> tuple[dict[str, str], dict[str, str]]:
    raw = (await git("diff-tree", "-r", "--raw", "-z", "--no-renames", old, new, cwd=checkout)).stdout
    fields = raw.decode(errors="surrogateescape").split("\0")
    before, after = {}, {}
    for meta, path in zip(fields[::2], fields[1::2], strict=False):
        old_mode, new_mode, old_id, new_id, _ = meta.lstrip(":").split()
        if int(old_mode, 8):
            before[path] = old_id
        if int(new_mode, 8):
            after[path] = new_id
    return before, after


async def _whose(git: Git, checkout: Path, path: str, before: str | None, after: str | None) -> str:
    """Tell whether a file is as `before` the push, as the push (or a part of it) left it, or somebody else's."""
    file = checkout / path
    content = await anyio.to_thread.run_sync(_read, file)
    if content is None:
        # Git unlinks a file before it writes the new one.
        return "old" if before is None else "new"
    identity = await _identity(git, checkout, path, content)
    if identity == before:
        return "old"
    if identity == after:
        return "new"
    if after is not None:
        filtered = await git("cat-file", "--filters", f"--path={path}", after, cwd=checkout)
        if filtered.stdout.startswith(content):
            return "new"
    return "foreign"


def _read(file: Path) -> bytes | None:
    if file.is_symlink():
        return os.fsencode(file.readlink())
    return file.read_bytes() if file.is_file() else None


async def _identity(git: Git, checkout: Path, path: str, content: bytes) -> str:
    if await anyio.to_thread.run_sync((checkout / path).is_symlink):
        algorithm = (await git("rev-parse", "--show-object-format", cwd=checkout)).stdout.decode().strip()
        return hashlib.new(algorithm, b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    hashed = await git("hash-object", "--stdin", f"--path={path}", cwd=checkout, input_=content)
    return hashed.stdout.decode().strip()


async def remove_stale_locks(
    repository: LocalRepository, checkout: Path | None, branch: str, since: float, git: Git
) -> None:
    """Remove the lock files that a killed push left in the user's repository.

    The caller holds proof that no process of that push lives; `since` (wall-clock seconds) is when it began.
    While any git command runs in the repository nothing is removed: the lock may be its own.
    """
    folders = [repository.git_dir]
    if checkout is not None:
        own = await git("rev-parse", "--absolute-git-dir", cwd=checkout)
        folders = [Path(own.stdout.decode(errors="surrogateescape").rstrip("\n")), repository.git_dir, checkout]
    locks = [folders[0] / "index.lock", folders[0] / "HEAD.lock"]
    locks.append(repository.git_dir / "refs" / "heads" / f"{branch}.lock")
    await anyio.to_thread.run_sync(_unlink_if_stale, locks, folders, since)


def _unlink_if_stale(locks: Sequence[Path], folders: Sequence[Path], since: float) -> None:
    if any(_git_runs_in(folder) for folder in folders):
        return
    for lock in locks:
        # Coarse file system time stamps may lag behind the clock that `since` was read from.
        if lock.exists() and lock.stat().st_mtime >= since - 2:
            lock.unlink()


def _git_runs_in(folder: Path) -> bool:
    """Whether a git command works in a folder; where there is no /proc (macOS) none can be seen."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder) and (process / "comm").read_text().startswith("git"):
                return True
        except OSError:  # it has ended, or is not ours
            continue
    return False
