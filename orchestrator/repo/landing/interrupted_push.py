"""Repair a checkout whose update by a push was interrupted.

A push into a checked-out branch writes files, then the index, then the ref. A kill in between leaves them inconsistent,
and the user may commit at any of these points. `recover_push` brings all three to one commit without touching the
user's changes: it changes only paths of the push, and only content that the push wrote.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import (
    FileChange,
    Git,
    join_nul,
    parse_raw_diff,
    printable_name,
)
from orchestrator.repo.source.checkout_update import (
    Stamp,
    read_stamp,
    remove_folder,
    replace_files,
    return_files,
    staging_folder,
)
from orchestrator.repo.source.user_checkouts import (
    LocalRepository,
    find_checkout,
    find_git_dir,
    has_lock_marker,
    list_checkouts,
    list_git_processes,
    list_left_out,
    lock_marker,
    read_current_branch,
    read_head_stats,
)
from orchestrator.system.process_table import process_ids

#: Name patterns of git's folders for the objects of a push that is not accepted yet.
_INCOMING: Final = "tmp_objdir-incoming-*"
#: The start of the files by which git keeps the pack of a push until its refs have moved.
_KEPT: Final = b"receive-pack "
#: Maximum seconds to wait for the user's git commands to exit, and seconds between checks.
_GIT_EXIT_TIMEOUT: Final = 2.0
_POLL_INTERVAL: Final = 0.02
#: The same for a possible switch to the target. Commands with a pager take longer.
_SWITCH_TIMEOUT: Final = 0.2


async def find_blocking_locks(repository: LocalRepository, checkout: Path, branch: str, git: Git) -> list[Path]:
    """Return the lock files that prevent moving a checked-out branch."""
    locks, _ = await _locks(repository, checkout, branch, git)
    return await anyio.to_thread.run_sync(lambda: [lock for lock in locks if lock.exists()])


async def update_switched_checkout(
    repository: LocalRepository, branch: str, move: tuple[str, str], before: Mapping[Path, tuple[int, int]], git: Git
) -> None:
    """Update a checkout that was switched to a branch while the branch moved.

    `move` is (old, new), and `before` are the `read_head_stats` taken before it. The push must not have updated a
    checkout. The switch may have written the branch's files as of when the switch started. Checkouts that were not
    switched are left alone.
    """
    tops = await anyio.to_thread.run_sync(list_checkouts, repository)
    await anyio.to_thread.run_sync(_wait_until_unused, lambda: bool(list_git_processes(tops)), _SWITCH_TIMEOUT)
    now = await anyio.to_thread.run_sync(read_head_stats, repository)
    if now == before or (checkout := await find_checkout(repository, branch, git)) is None:
        return
    git_dir = await anyio.to_thread.run_sync(lambda: find_git_dir(checkout).resolve())
    if now.get(git_dir) != before.get(git_dir):
        old, new = move
        await _InterruptedUpdate(checkout, branch, git, old=new, tip=new, new=old).undo([], has_just_ended=True)


async def recover_push(
    repository: LocalRepository,
    checkout: Path | None,
    branch: str,
    move: tuple[str | None, str],
    since: float,
    git: Git,
    *,
    may_finish: bool,
    was_killed: bool = True,
) -> list[str]:
    """Bring ref, index and files to one commit after an interrupted push.

    `move` is the (old, new) of the branch, and `since` (wall-clock seconds) is when the push began. The checkout must
    have been clean right before the push, and no process of the push may be running. With `may_finish`, a move that
    lacks only the ref is finished by a compare-and-swap; otherwise, as the push may have been refused, it is undone. A
    push is also undone if the user has since committed or switched to another branch: its paths are then reset to the
    checkout's current commit.

    Only paths that the move changes are touched, and of those only index entries and files with the content of the
    move: whole files, or one partial file and empty files if there is evidence that the push was writing. Evidence is a
    lock on the index, other such files, or that the push has just ended. Returns the paths that match neither commit,
    which are left unchanged. Unless the push `was_killed`, all locks but its own are the user's.
    """
    stale = await _stale_locks(repository, checkout, branch, since if was_killed else None, git)
    old, new = move
    foreign: list[str] = []
    has_just_ended = not may_finish
    if checkout is not None and await _has_all_objects(checkout, old, new, git):
        tip = await _tip(checkout, git)
        if tip is None or not await git.is_ancestor(new, tip, cwd=checkout):
            before = old or repository.empty_tree
            # If the user has deleted the branch, leave the files at its old commit.
            update = _InterruptedUpdate(checkout, branch, git, before, tip or before, new)
            may_finish = may_finish and tip == old and await read_current_branch(checkout, git) == branch
            if may_finish and await update.is_staged():
                # The index stays locked, as in a push. Git locks the rest itself.
                await anyio.to_thread.run_sync(_unlink, [lock for lock in stale if lock.name != "index.lock"])
                reflog = "council: finish an interrupted landing"
                await git("update-ref", "-m", reflog, f"refs/heads/{branch}", new, old or "0" * len(new), cwd=checkout)
            else:
                foreign = await update.undo(stale, has_just_ended=has_just_ended)
                foreign += await _catch_up(update, tip)
    # Unlock last: while the index is locked, the next recovery can tell that this one was interrupted.
    if checkout is not None:
        await anyio.to_thread.run_sync(remove_folder, await _staging(checkout, branch))
    await anyio.to_thread.run_sync(_unlink, stale)
    await anyio.to_thread.run_sync(remove_incoming_objects, repository.git_dir, since)
    return foreign


async def _catch_up(undone: _InterruptedUpdate, tip: str | None) -> list[str]:
    """Apply the user's concurrent commits to the undone paths; return changed paths.

    `git commit` reads the index before it moves the branch, so the user's commit may contain everything that the update
    had staged.
    """
    foreign: list[str] = []
    while (now := await _read_stable_tip(undone.checkout, undone.git)) is not None and now != tip:
        back = replace(undone, old=undone.new, tip=now, new=tip or undone.tip)
        foreign += await back.undo([], has_just_ended=True)
        tip = now
    return foreign


async def _read_stable_tip(checkout: Path, git: Git) -> str | None:
    """Return a checkout's commit once no git command runs in it, or on timeout."""
    await anyio.to_thread.run_sync(_wait_until_unused, lambda: bool(list_git_processes([checkout])))
    return await _tip(checkout, git)


async def _has_all_objects(checkout: Path, old: str | None, new: str, git: Git) -> bool:
    """Return whether all new objects of a commit exist, which a kill may prevent."""
    before = () if old is None else (f"^{old}",)
    walk = await git("rev-list", "--objects", "--quiet", new, *before, cwd=checkout, ok=(0, 1, 128))
    return walk.returncode == 0


async def _tip(checkout: Path, git: Git) -> str | None:
    ref = await git("rev-parse", "--verify", "--quiet", "HEAD", cwd=checkout, ok=(0, 1))
    return ref.stdout.decode().strip() or None


@dataclass(frozen=True, slots=True)
class _InterruptedUpdate:
    """An interrupted update of a checkout from `old` to `new`, with HEAD at `tip`."""

    checkout: Path
    branch: str
    git: Git
    old: str
    tip: str
    new: str

    async def is_staged(self) -> bool:
        """Return whether the index contains all changes of the update."""
        unlike_new = await self._staged_unlike(self.new)
        return not any(change.path in unlike_new for change in await self._changes(self.old))

    async def undo(self, stale: Sequence[Path], *, has_just_ended: bool) -> list[str]:
        """Restore index entries and files to `tip`; return the paths changed since.

        `stale` are the update's leftover locks. With `has_just_ended`, no other process had time to change files. The
        index stays locked until everything is undone, even on failure, so that the user can't commit part of the update
        or carry it to another branch. The index is written first, so that after an interruption the next recovery still
        detects an interrupted push, and does not finish an update whose files are already undone.
        """
        staging = await _staging(self.checkout, self.branch)
        await anyio.to_thread.run_sync(return_files, str(self.checkout), staging)
        ours = {change.path for change in await self._changes(self.old)}
        changes = {change.path: change for change in await self._changes(self.tip) if change.path in ours}
        unlike_new, unlike_tip = await self._staged_unlike(self.new), await self._staged_unlike(self.tip)
        staged = [path for path in changes if path not in unlike_new]
        left_out = await list_left_out(self.checkout, self.git)
        before = {path: change.old_id for path, change in changes.items() if int(change.old_mode, 8)}
        after = {path: change.new_id for path, change in changes.items() if int(change.new_mode, 8)}
        kinds = ("old", "new", "partial", "restored", "empty", "foreign")
        by_kind: dict[str, list[str]] = {kind: [] for kind in kinds}
        stamps: dict[str, Stamp | None] = {}
        for path in sorted(changes):
            is_theirs = path in unlike_new and path in unlike_tip
            stamps[path] = await anyio.to_thread.run_sync(read_stamp, str(self.checkout), path)  # before reading it
            kind = await _classify_file(self.git, self.checkout, path, before.get(path), after.get(path))
            if kind == "empty" and path in left_out:
                kind = "old"
            by_kind["foreign" if is_theirs else kind].append(path)
        # Git writes files one by one, so a kill leaves at most one partial file. On a full disk the following files are
        # empty.
        is_locked = any(lock.name == "index.lock" for lock in stale)
        was_writing = bool(staged or by_kind["new"]) or is_locked or has_just_ended
        incomplete = by_kind["partial"] + by_kind["restored"] + by_kind["empty"]
        are_ours = len(by_kind["partial"]) <= 1 and len(by_kind["restored"]) <= 1 and was_writing
        written = by_kind["new"] + (incomplete if are_ours else [])
        foreign = by_kind["foreign"] + ([] if are_ours else incomplete)
        if written or staged:
            git_dir = await anyio.to_thread.run_sync(find_git_dir, self.checkout)
            await anyio.to_thread.run_sync(_lock_index, git_dir, self.branch, stale)
            if staged:
                index = await anyio.to_thread.run_sync(_copy_index, git_dir, self.branch)
                entries = (f"{changes[path].old_mode} {changes[path].old_id}\t{path}" for path in staged)
                env, arguments = {"GIT_INDEX_FILE": str(index)}, ("update-index", "-z", "--index-info")
                await self.git(*arguments, cwd=self.checkout, env=env, input_=join_nul(entries))
                if again := [path for path in staged if path in left_out and path in before]:
                    options = ("--skip-worktree", "-z", "--stdin")
                    await self.git("update-index", *options, cwd=self.checkout, env=env, input_=join_nul(again))
                await anyio.to_thread.run_sync(index.replace, git_dir / "index")
            foreign += await self._restore(git_dir, staging, {path: stamps[path] for path in written})
            await anyio.to_thread.run_sync(_unlink, [git_dir / "index.lock"])
            await self.git("update-index", "-q", "--refresh", "--ignore-submodules", cwd=self.checkout, ok=range(256))
        return [printable_name(path) for path in sorted(foreign)]

    async def _restore(self, git_dir: Path, staging: str, stamps: Mapping[str, Stamp | None]) -> list[str]:
        """Give these files the content of `tip`; return the paths that have changed since they were read."""
        # Like a copy that replaces the index, these are removed by the next recovery if this one fails.
        index, lock = _copies(git_dir, self.branch)
        await anyio.to_thread.run_sync(_unlink, [index, lock])
        await anyio.to_thread.run_sync(remove_folder, staging)
        await anyio.Path(staging, "new").mkdir(parents=True)
        env = {"GIT_INDEX_FILE": str(index)}
        await self.git("read-tree", self.new, cwd=self.checkout, env=env)
        env["GIT_WORK_TREE"] = f"{staging}/new"
        await self.git("read-tree", "-u", "-m", self.new, self.tip, cwd=self.checkout, env=env)
        changed = await anyio.to_thread.run_sync(replace_files, str(self.checkout), staging, stamps)
        await anyio.to_thread.run_sync(_unlink, [index])
        await anyio.to_thread.run_sync(remove_folder, staging)
        return changed

    async def _changes(self, since: str) -> list[FileChange]:
        return await self.git.changes(since, self.new, cwd=self.checkout)

    async def _staged_unlike(self, commit: str) -> set[str]:
        arguments = ("diff-index", "--cached", "--raw", "-z", "--no-renames", "--ignore-submodules=none", commit)
        return {change.path for change in parse_raw_diff((await self.git(*arguments, cwd=self.checkout)).stdout)}


def _lock_index(git_dir: Path, branch: str, stale: Sequence[Path]) -> None:
    """Lock an index with our marker, unless already locked by it.

    Raises RefusedError if the user's git has locked the index.
    """
    lock = git_dir / "index.lock"
    if has_lock_marker(lock, branch):
        return
    _unlink([path for path in stale if path == lock])
    try:
        with lock.open("x") as file:
            file.write(lock_marker(branch))
    except FileExistsError:
        raise RefusedError(f"{lock} already exists", "remove it if none of your git commands is running") from None


def _copy_index(git_dir: Path, branch: str) -> Path:
    """Copy an index locked with our marker; return the copy, which will replace it."""
    copy, lock = _copies(git_dir, branch)
    _unlink([lock])
    shutil.copy2(git_dir / "index", copy)
    return copy


async def _staging(checkout: Path, branch: str) -> str:
    git_dir = await anyio.to_thread.run_sync(find_git_dir, checkout)
    return staging_folder(str(git_dir), lock_marker(branch))


async def _classify_file(git: Git, checkout: Path, path: str, before: str | None, after: str | None) -> str:
    """Return the version of a file after an interrupted push: `old`, `new` or `foreign`.

    A file that a push or an undo was writing is `partial` (part of the new content), `restored` (part of the old
    content) or `empty`.
    """
    content = await anyio.to_thread.run_sync(_read, checkout / path)
    if content is None:
        # Git unlinks a file before it writes the new one.
        return "old" if before is None else "new" if after is None else "empty"
    identity = await _identity(git, checkout, path, content)
    if identity == before:
        return "old"
    if identity == after:
        return "new"
    for blob, part in ((after, "partial"), (before, "restored")):
        if blob is not None:
            filtered = await git("cat-file", "--filters", f"--path={path}", blob, cwd=checkout)
            if filtered.stdout.startswith(content):
                return part if content else "empty"
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


async def _stale_locks(
    repository: LocalRepository, checkout: Path | None, branch: str, since: float | None, git: Git
) -> list[Path]:
    """Return the lock files of a killed push, except those of running commands."""
    locks, folders = await _locks(repository, checkout, branch, git)
    ours = await anyio.to_thread.run_sync(_marked_files, folders[0], branch)
    others = [lock for lock in locks if lock not in ours]
    if since is None:
        return ours
    return [*ours, *await anyio.to_thread.run_sync(_find_stale, others, folders, since)]


def _marked_files(git_dir: Path, branch: str) -> list[Path]:
    """Return the index files of our push: the lock, and the new index with its lock."""
    return [path for path in _copies(git_dir, branch) if path.exists()] + [
        lock for lock in [git_dir / "index.lock"] if has_lock_marker(lock, branch)
    ]


def _copies(git_dir: Path, branch: str) -> tuple[Path, Path]:
    """Return the new index that replaces one locked with our marker, and its lock."""
    copy = git_dir / f"index.{lock_marker(branch)}"
    return copy, copy.with_name(f"{copy.name}.lock")


async def _locks(
    repository: LocalRepository, checkout: Path | None, branch: str, git: Git
) -> tuple[list[Path], list[Path]]:
    """Return the lock files that a push creates, and its working folders."""
    folders = [repository.git_dir]
    if checkout is not None:
        own = await git("rev-parse", "--absolute-git-dir", cwd=checkout)
        folders = [Path(own.stdout.decode(errors="surrogateescape").rstrip("\n")), repository.git_dir, checkout]
    locks = [folders[0] / "index.lock", folders[0] / "HEAD.lock"]
    if folders[0] != repository.git_dir:  # the HEAD of a bare repository may also point to the branch
        locks.append(repository.git_dir / "HEAD.lock")
    locks.append(repository.git_dir / "refs" / "heads" / f"{branch}.lock")
    return locks, folders


def _find_stale(locks: Sequence[Path], folders: Sequence[Path], since: float) -> list[Path]:
    stale: list[Path] = []

    def is_used() -> bool:
        # Coarse file system timestamps may lag behind the clock that `since` was read from.
        stale[:] = [lock for lock in locks if _modified(lock) >= since - 2]
        return bool(stale) and (bool(list_git_processes(folders)) or _is_open(stale))

    # Only the checked files: the user may have started a command with another lock since.
    return stale if _wait_until_unused(is_used) else []


def remove_incoming_objects(git_dir: Path, since: float) -> None:
    """Remove objects received by a killed push, which no ref ever pointed to. Blocks.

    Git would also prune them. Each `git receive-pack` runs in the git directory: if none is running, folders created
    after `since` have no owner.
    """
    incoming: list[Path] = []

    def is_used() -> bool:
        incoming[:] = [path for path in (git_dir / "objects").glob(_INCOMING) if _modified(path) >= since - 2]
        return bool(incoming) and bool(list_git_processes([git_dir]))

    for folder in incoming if _wait_until_unused(is_used) else []:
        shutil.rmtree(folder, ignore_errors=True)


async def release_pack(repository: LocalRepository, new: str, git: Git) -> None:
    """Let git prune or repack the objects of a killed push of `new` again."""
    for keep, index in await anyio.to_thread.run_sync(_read_kept_packs, repository.git_dir):
        listed = await git("show-index", cwd=repository.folder, input_=index)
        if new.encode() in listed.stdout.split():
            await anyio.to_thread.run_sync(_unlink, [keep])


def _read_kept_packs(git_dir: Path) -> list[tuple[Path, bytes]]:
    """Return the marks of packs that git keeps for a push, with the packs' indexes."""
    kept = []
    for keep in (git_dir / "objects/pack").glob("*.keep"):
        with suppress(FileNotFoundError):  # a push of the user's has just ended
            if keep.read_bytes().startswith(_KEPT):
                kept.append((keep, keep.with_suffix(".idx").read_bytes()))
    return kept


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _unlink(locks: Sequence[Path]) -> None:
    for lock in locks:
        lock.unlink(missing_ok=True)


def _is_open(files: Sequence[Path]) -> bool:
    """Return whether a process has one of these files open, as lock owners do."""
    names = {str(file) for file in files}
    for pid in process_ids():
        with suppress(OSError):  # it has exited, or belongs to another user
            if any(str(link.readlink()) in names for link in Path(f"/proc/{pid}/fd").iterdir()):
                return True
    return False


def _wait_until_unused(is_used: Callable[[], bool], limit: float = _GIT_EXIT_TIMEOUT) -> bool:
    """Wait up to `limit` seconds until the user's git commands have exited. Blocks."""
    deadline = time.monotonic() + limit
    while is_used():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_INTERVAL)  # the user's git commands are short, and more may follow
    return True
