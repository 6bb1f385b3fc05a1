"""Bring a slot to a commit: check out, copy, move, or clean after a session.

Cleaning relies on the detected changes (`repo.worktrees.files.change_detection`): it removes added files, rewrites
files that may have changed, and touches nothing else. If the changes can't be determined, or something is in the way,
the slot must be removed.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio.to_thread

from orchestrator.repo.git.command import Git, join_nul, split_nul
from orchestrator.repo.git.index_file import count_entries, refresh_index_stats
from orchestrator.repo.worktrees.files.change_detection import TreeDiff, TreeSnapshot
from orchestrator.repo.worktrees.files.file_trees import copy_tree
from orchestrator.repo.worktrees.files.scan_process import FileScanner
from orchestrator.repo.worktrees.slots import SlotRecord, WorktreeSlot, move_to_trash
from orchestrator.system.failpoints import failpoint

_SPARSE = ("-c", "core.sparseCheckout=true", "-c", "core.sparseCheckoutCone=true")


@dataclass(frozen=True, slots=True)
class SlotContents:
    """The contents of a clean slot, and the file snapshot for detecting changes to it."""

    record: SlotRecord
    snapshot: TreeSnapshot


@dataclass(frozen=True, slots=True)
class KeepRules:
    """Ignored names or paths to preserve, each with its adapter.

    An empty adapter name means all adapters.
    """

    patterns: tuple[tuple[str, str], ...] = ()

    def adapter_of(self, path: str) -> str | None:
        """Return the adapter that a path is preserved for ("" for all), or None."""
        name = path.rpartition("/")[2]
        return next((adapter for pattern, adapter in self.patterns if pattern in {path, name}), None)


def slot_git(git: Git, slot: WorktreeSlot, sparse: Sequence[str] = ()) -> Git:
    """Return sandboxed git for a slot's checkout, based on the trusted repository."""
    own = replace(git, git_dir=slot.git_dir, flags=(*git.flags, *(_SPARSE if sparse else ())))
    return own.confined(readable=(slot.hub.trusted, slot.hub.objects), writable=(slot.tree, slot.git_dir))


async def check_out_slot(git: Git, slot: WorktreeSlot, commit: str, sparse: Sequence[str]) -> None:
    """Write a commit's files into a new slot. Call `index_slot` afterwards."""
    await anyio.to_thread.run_sync(_lay_out, slot, sparse, None)
    failpoint("slot.partly_made")
    await git("read-tree", "--reset", "-u", commit, env=slot.env, cwd=slot.tree)


async def copy_slot(git: Git, source: WorktreeSlot, slot: WorktreeSlot, sparse: Sequence[str]) -> None:
    """Fill a new slot by copying a clean, unused slot at the same commit.

    Call `index_slot` afterwards, as after `check_out_slot`.
    """
    await anyio.to_thread.run_sync(_lay_out, slot, sparse, source.index)
    failpoint("slot.partly_made")
    await copy_tree(f"{source.tree}/.", slot.tree, git.environ, git.keep_fds)


async def index_slot(git: Git, slot: WorktreeSlot, scanner: FileScanner) -> TreeSnapshot | None:
    """Refresh a new slot's index; return its snapshot, None if unreliable."""
    # Otherwise the first `git status` of each session would read all files.
    files = await anyio.to_thread.run_sync(count_entries, slot.index)
    if not await scanner.run(partial(refresh_index_stats, slot.index, slot.tree), files):
        await git("update-index", "-q", "--refresh", env=slot.env, cwd=slot.tree)
    return await anyio.to_thread.run_sync(TreeSnapshot.capture, slot.tree)


async def move_slot(git: Git, slot: WorktreeSlot, contents: SlotContents, commit: str) -> SlotContents | None:
    """Move a clean slot to another commit; return None if its files are not known."""
    record, snapshot = contents.record, contents.snapshot
    if record.commit == commit:
        return contents
    listed = await git("diff-tree", "-r", "--name-only", "-z", "--no-renames", record.commit, commit)
    paths = split_nul(listed.stdout)
    # Git overwrites ignored files.
    if _overlap(paths, {*record.extras, *record.kept}):
        return None
    await git("read-tree", "-m", "-u", record.commit, commit, env=slot.env, cwd=slot.tree)
    failpoint("slot.moved")
    names = {path.rpartition("/")[2] for path in paths}
    if ".gitattributes" in names:
        # Git does not rewrite files with the same content in both commits, although new attributes may apply to them.
        same = _files_under_attributes(snapshot, paths) - {*paths, *record.extras}
        await anyio.to_thread.run_sync(_remove, slot, (), same)
        await _write(git, slot, same)
        paths += same
    kept = await list_ignored(git, slot, list(record.kept)) if ".gitignore" in names else record.kept.keys()
    await anyio.to_thread.run_sync(_remove, slot, (), record.kept.keys() - kept)
    preserved = {path: owner for path, owner in record.kept.items() if path in kept}
    refreshed = await anyio.to_thread.run_sync(snapshot.refreshed, [*paths, *(record.kept.keys() - kept)], preserved)
    return None if refreshed is None else SlotContents(replace(record, commit=commit, kept=preserved), refreshed)


async def clean_slot(
    git: Git, slot: WorktreeSlot, contents: SlotContents, diff: TreeDiff, keep: KeepRules
) -> SlotContents | None:
    """Restore a slot to its state at assignment, except for files to preserve.

    `diff` has the changes since then, and no other process may write to the slot. Returns None if the state can't be
    restored because a setup file was changed or too little is known. Raises GitError or OSError if something is in the
    way.
    """
    record, snapshot = contents.record, contents.snapshot
    written = [*diff.changed, *diff.removed]
    if not set(record.extras).isdisjoint(written):
        return None
    wanted = [path for path in diff.added if keep.adapter_of(path) is not None]
    removed = [*(path for path in diff.added if path not in wanted), *diff.replaced, *diff.changed]
    await anyio.to_thread.run_sync(_remove, slot, diff.touched_folders, removed)
    await _write(git, slot, written)
    if empty := [path for path in (*diff.ambiguous, *diff.replaced) if snapshot.is_empty(path)]:
        await anyio.to_thread.run_sync(_make_folders, slot.tree, empty)
    # Also check files preserved earlier: they may no longer be ignored.
    owners = {**record.kept, **{path: keep.adapter_of(path) or "" for path in wanted}}
    kept = await list_ignored(git, slot, list(owners))
    if record.setup and not record.kept.keys() <= kept:
        return None  # setup may have created it
    if unwanted := owners.keys() - kept:
        await anyio.to_thread.run_sync(_remove, slot, (), unwanted)
    preserved = {path: owner for path, owner in owners.items() if path in kept}
    changed = [*written, *diff.added, *diff.replaced, *diff.ambiguous]
    refreshed = await anyio.to_thread.run_sync(
        lambda: snapshot.refreshed((p for p in changed if p not in kept), preserved)
    )
    return None if refreshed is None else SlotContents(replace(record, kept=preserved), refreshed)


async def remove_kept_of_others(slot: WorktreeSlot, contents: SlotContents, adapter: str) -> SlotContents | None:
    """Remove files that are preserved for sessions of other adapters."""
    others = [path for path, owner in contents.record.kept.items() if owner not in {"", adapter}]
    if not others:
        return contents
    await anyio.to_thread.run_sync(_remove, slot, (), others)
    kept = {path: owner for path, owner in contents.record.kept.items() if path not in others}
    refreshed = await anyio.to_thread.run_sync(contents.snapshot.refreshed, others, kept)
    return None if refreshed is None else SlotContents(replace(contents.record, kept=kept), refreshed)


async def list_ignored(git: Git, slot: WorktreeSlot, paths: Sequence[str]) -> set[str]:
    """Return the paths that git ignores according to the commit's files."""
    if not paths:
        return set()
    return await git.ignored(paths, slot.tree, slot.env)


async def list_untracked(git: Git, slot: WorktreeSlot) -> tuple[list[str], list[str], list[str]]:
    """Return untracked files, their topmost paths, and the files not ignored."""
    listings = []
    for option in ((), ("--directory",), ("--exclude-standard",)):
        done = await git("ls-files", "--others", *option, "-z", env=slot.env, cwd=slot.tree)
        listings.append([path.rstrip("/") for path in split_nul(done.stdout)])
    files, top, unignored = listings
    return files, top, unignored


async def restore_files(git: Git, slot: WorktreeSlot) -> None:
    """Rewrite committed files that setup has changed."""
    await git("checkout-index", "--force", "--all", "--index", env=slot.env, cwd=slot.tree)


async def _write(git: Git, slot: WorktreeSlot, paths: Collection[str]) -> None:
    """Write files from the index, beginning with .gitattributes, which affect others."""
    rules = [path for path in paths if path.rpartition("/")[2] == ".gitattributes"]
    rest = [path for path in paths if path.rpartition("/")[2] != ".gitattributes"]
    for part in (rules, rest):
        if part:
            command = ("checkout-index", "--force", "--index", "-z", "--stdin")
            await git(*command, env=slot.env, cwd=slot.tree, input_=join_nul(part))
            failpoint("slot.partly_clean")


def _overlap(paths: Iterable[str], others: Collection[str]) -> bool:
    """Return whether a path equals, contains or is inside one of the other paths."""
    if not others:
        return False
    paths = set(paths)
    return not paths.isdisjoint(_with_parents(others)) or not _with_parents(paths).isdisjoint(others)


def _with_parents(paths: Iterable[str]) -> set[str]:
    """Return the paths and all folders above them."""
    parents = set[str]()
    for path in paths:
        current = path
        while current and current not in parents:
            parents.add(current)
            current = current.rpartition("/")[0]
    return parents


def _files_under_attributes(snapshot: TreeSnapshot, paths: Iterable[str]) -> set[str]:
    """Return the files to which the .gitattributes files among the paths apply."""
    rules = [path for path in paths if path.rpartition("/")[2] == ".gitattributes"]
    folders = tuple(path.removesuffix(".gitattributes") for path in rules)
    return {
        path + name for path, folder in snapshot.folders.items() if path.startswith(folders) for name in folder.files
    }


def _lay_out(slot: WorktreeSlot, sparse: Sequence[str], index: Path | None) -> None:
    slot.root.mkdir(mode=0o700, exist_ok=True)
    for folder in (slot.tree, slot.git_dir, slot.git_dir / "info", slot.scratch):
        folder.mkdir()
    # gitrepository-layout(5): everything but HEAD, the index and a few files in `info` is read from `commondir`.
    (slot.git_dir / "commondir").write_text(f"{slot.hub.trusted}\n")
    (slot.git_dir / "HEAD").write_text("ref: refs/heads/none\n")
    if sparse:
        (slot.git_dir / "info" / "sparse-checkout").write_text(format_sparse_patterns(sparse))
    if index is not None:
        shutil.copyfile(index, slot.index)


def format_sparse_patterns(folders: Iterable[str]) -> str:
    """Return the cone-mode patterns (git-sparse-checkout(1)) for these folders."""
    parents, whole = set[str](), {_escaped(folder.strip("/")) for folder in folders}
    for folder in whole:
        parts = folder.split("/")
        parents.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    lines = ["/*", "!/*/"]
    for folder in sorted(parents | whole):
        lines.append(f"/{folder}/")
        if folder not in whole:
            lines.append(f"!/{folder}/*/")
    return "".join(f"{line}\n" for line in lines)


def _escaped(folder: str) -> str:
    return re.sub(r"([*?\[\]\\])", r"\\\1", folder)


def _remove(slot: WorktreeSlot, touched: Iterable[str], paths: Iterable[str]) -> None:
    tree = slot.tree
    mode = stat.S_IMODE(slot.git_dir.stat().st_mode)  # created like the checkout, but inaccessible to sessions
    for path in sorted(touched):
        _restore_folder_mode(tree / path.strip("/"), mode)
    for path in (".git", *paths):
        _remove_entry(slot, tree / path.rstrip("/"))


def _restore_folder_mode(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    # Default ACLs, which new files inherit, are also extended attributes (acl(5)).
    for name in os.listxattr(folder, follow_symlinks=False) if hasattr(os, "listxattr") else ():
        if not name.startswith("security."):
            os.removexattr(folder, name, follow_symlinks=False)


def _remove_entry(slot: WorktreeSlot, path: Path) -> None:
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            path.chmod(0o700)  # moving a folder requires write permission on it
            move_to_trash(slot.hub, path)
        else:
            path.unlink()


def _make_folders(tree: Path, paths: Iterable[str]) -> None:
    for path in paths:
        (tree / path).mkdir(parents=True, exist_ok=True)
