"""Brings the checkout of a place to a commit: anew, as a copy, from another commit, or from what was left.

Cleaning goes by what differs (`repo.worktrees.change_detection`): what was not there is removed, what may have changed is written anew, and
nothing else is touched. Where that can't be told, or something gets in the way, the place is to be thrown away.
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
from orchestrator.repo.worktrees.change_detection import TreeDiff, TreeSnapshot
from orchestrator.repo.worktrees.copying import copy_tree
from orchestrator.repo.worktrees.scan_process import FileScanner
from orchestrator.repo.worktrees.slots import SlotRecord, WorktreeSlot, move_to_trash
from orchestrator.system.failpoints import failpoint

_SPARSE = ("-c", "core.sparseCheckout=true", "-c", "core.sparseCheckoutCone=true")


@dataclass(frozen=True, slots=True)
class SlotContents:
    """What a clean place holds, and the stamps by which that can be told."""

    record: SlotRecord
    snapshot: TreeSnapshot


@dataclass(frozen=True, slots=True)
class KeepRules:
    """Ignored files and folders that stay: names, or paths from the top, each with the adapter that they are for.

    Without an adapter (an empty name) they are for all.
    """

    patterns: tuple[tuple[str, str], ...] = ()

    def adapter_of(self, path: str) -> str | None:
        """Return for whose sessions a path is to stay; None if it is not."""
        name = path.rpartition("/")[2]
        return next((adapter for pattern, adapter in self.patterns if pattern in {path, name}), None)


def slot_git(git: Git, place: WorktreeSlot, sparse: Sequence[str] = ()) -> Git:
    """Return what runs git on the checkout of a place, in a sandbox: with the trusted repository behind."""
    own = replace(git, git_dir=place.git_dir, flags=(*git.flags, *(_SPARSE if sparse else ())))
    return own.confined(readable=(place.hub.trusted, place.hub.objects), writable=(place.tree, place.git_dir))


async def check_out_slot(git: Git, place: WorktreeSlot, commit: str, sparse: Sequence[str]) -> None:
    """Write a commit's files into a new place; `git` is that of `admin`. `index_slot` is to follow."""
    await anyio.to_thread.run_sync(_lay_out, place, sparse, None)
    failpoint("slot.partly_made")
    await git("read-tree", "--reset", "-u", commit, env=place.env, cwd=place.tree)


async def copy_slot(git: Git, source: WorktreeSlot, place: WorktreeSlot, sparse: Sequence[str]) -> None:
    """Do what `check_out_slot` does by copying a place that holds the same and is clean; nobody may use that meanwhile."""
    await anyio.to_thread.run_sync(_lay_out, place, sparse, source.index)
    failpoint("slot.partly_made")
    await copy_tree(f"{source.tree}/.", place.tree, git.environ, git.keep_fds)


async def index_slot(git: Git, place: WorktreeSlot, walker: FileScanner) -> TreeSnapshot | None:
    """Have the index of a new place know its files; return the stamps of these, None where they can't be relied on."""
    # Otherwise each session's first look would read all of them.
    files = await anyio.to_thread.run_sync(count_entries, place.index)
    if not await walker.run(partial(refresh_index_stats, place.index, place.tree), files):
        await git("update-index", "-q", "--refresh", env=place.env, cwd=place.tree)
    return await anyio.to_thread.run_sync(TreeSnapshot.take, place.tree)


async def move_slot(git: Git, place: WorktreeSlot, contents: SlotContents, commit: str) -> SlotContents | None:
    """Bring a clean place from its commit to another one; None where what can be told of it is not enough."""
    record, stamps = contents.record, contents.snapshot
    if record.commit == commit:
        return contents
    listed = await git("diff-tree", "-r", "--name-only", "-z", "--no-renames", record.commit, commit)
    paths = split_nul(listed.stdout)
    # Git writes over what is ignored.
    if _overlap(paths, {*record.extras, *record.kept}):
        return None
    await git("read-tree", "-m", "-u", record.commit, commit, env=place.env, cwd=place.tree)
    failpoint("slot.moved")
    names = {path.rpartition("/")[2] for path in paths}
    if ".gitattributes" in names:
        # Git leaves files as they are whose content is the same in both commits.
        same = _files_under_attributes(stamps, paths) - {*paths, *record.extras}
        await anyio.to_thread.run_sync(_remove, place, (), same)
        await _write(git, place, same)
        paths += same
    kept = await list_ignored(git, place, list(record.kept)) if ".gitignore" in names else record.kept.keys()
    await anyio.to_thread.run_sync(_remove, place, (), record.kept.keys() - kept)
    stays = {path: owner for path, owner in record.kept.items() if path in kept}
    renewed = await anyio.to_thread.run_sync(stamps.renewed, [*paths, *(record.kept.keys() - kept)], stays)
    return None if renewed is None else SlotContents(replace(record, commit=commit, kept=stays), renewed)


async def clean_slot(
    git: Git, place: WorktreeSlot, contents: SlotContents, found: TreeDiff, keep: KeepRules
) -> SlotContents | None:
    """Make a place again what it was when it was handed out, but for what is to be kept.

    None where that can't be had: what setup made was changed, or what can be told of it is not enough. GitError or
    OSError where something gets in the way. `found` is what differs by now, and nobody else writes to it.
    """
    record, stamps = contents.record, contents.snapshot
    written = [*found.changed, *found.gone]
    if not set(record.extras).isdisjoint(written):
        return None
    wanted = [path for path in found.added if keep.adapter_of(path) is not None]
    removed = [*(path for path in found.added if path not in wanted), *found.replaced, *found.changed]
    await anyio.to_thread.run_sync(_remove, place, found.touched_folders, removed)
    await _write(git, place, written)
    empty = [path for path in (*found.ambiguous, *found.replaced) if stamps.is_empty(path)]
    await anyio.to_thread.run_sync(_make_folders, place.tree, empty)
    # Also what was kept before: it may have become something else.
    owners = {**record.kept, **{path: keep.adapter_of(path) or "" for path in wanted}}
    kept = await list_ignored(git, place, list(owners))
    if record.setup and not record.kept.keys() <= kept:
        return None  # it may have been made by setup
    await anyio.to_thread.run_sync(_remove, place, (), owners.keys() - kept)
    stays = {path: owner for path, owner in owners.items() if path in kept}
    changed = [*written, *found.added, *found.replaced, *found.ambiguous]
    renewed = await anyio.to_thread.run_sync(lambda: stamps.renewed((p for p in changed if p not in kept), stays))
    return None if renewed is None else SlotContents(replace(record, kept=stays), renewed)


async def remove_kept_of_others(place: WorktreeSlot, contents: SlotContents, adapter: str) -> SlotContents | None:
    """Remove what is kept for sessions of other adapters."""
    others = [path for path, owner in contents.record.kept.items() if owner not in {"", adapter}]
    if not others:
        return contents
    await anyio.to_thread.run_sync(_remove, place, (), others)
    kept = {path: owner for path, owner in contents.record.kept.items() if path not in others}
    renewed = await anyio.to_thread.run_sync(contents.snapshot.renewed, others, kept)
    return None if renewed is None else SlotContents(replace(contents.record, kept=kept), renewed)


async def add_content_changes(git: Git, place: WorktreeSlot, found: TreeDiff) -> TreeDiff | None:
    """Return what differs where the file system does not tell of every change: also files whose content does.

    None where what the session did to the rules for reading files makes that uncertain.
    """
    if any(path.rpartition("/")[2] == ".gitattributes" for path in (*found.changed, *found.gone, *found.added)):
        return None
    before = await anyio.to_thread.run_sync(place.index.stat)
    try:
        # Git reads a file that is as young as the index (racy-git in its documentation), and so all of them.
        await anyio.to_thread.run_sync(lambda: os.utime(place.index, (0, 0)))
        done = await git("diff-files", "--name-only", "-z", env=place.env, cwd=place.tree)
    finally:
        times = (before.st_atime_ns, before.st_mtime_ns)
        await anyio.to_thread.run_sync(lambda: os.utime(place.index, ns=times))
    differs = split_nul(done.stdout)
    known = {*found.changed, *found.gone}
    return replace(found, changed=[*found.changed, *(path for path in differs if path not in known)])


async def list_ignored(git: Git, place: WorktreeSlot, paths: Sequence[str]) -> set[str]:
    """Return those of the paths that git ignores, by what the files of the commit say."""
    if not paths:
        return set()
    return await git.ignored(paths, place.tree, place.env)


async def list_untracked(git: Git, place: WorktreeSlot) -> tuple[list[str], list[str], list[str]]:
    """Return the files in a place that are in no commit, what is topmost of them, and those that are not ignored."""
    found = []
    for option in ((), ("--directory",), ("--exclude-standard",)):
        done = await git("ls-files", "--others", *option, "-z", env=place.env, cwd=place.tree)
        found.append([path.rstrip("/") for path in split_nul(done.stdout)])
    files, top, unignored = found
    return files, top, unignored


async def restore_files(git: Git, place: WorktreeSlot) -> None:
    """Write the files of the commit anew that a command of ours has changed."""
    await git("checkout-index", "--force", "--all", "--index", env=place.env, cwd=place.tree)


async def _write(git: Git, place: WorktreeSlot, paths: Collection[str]) -> None:
    """Write files as the index has them; those that say how others are to be written first."""
    rules = [path for path in paths if path.rpartition("/")[2] == ".gitattributes"]
    rest = [path for path in paths if path.rpartition("/")[2] != ".gitattributes"]
    for part in (rules, rest):
        if part:
            command = ("checkout-index", "--force", "--index", "-z", "--stdin")
            await git(*command, env=place.env, cwd=place.tree, input_=join_nul(part))
            failpoint("slot.partly_clean")


def _overlap(paths: Iterable[str], others: Collection[str]) -> bool:
    """Whether one of the paths is one of the others, or in it, or the other way round."""
    if not others:
        return False
    paths = set(paths)
    return not paths.isdisjoint(_with_parents(others)) or not _with_parents(paths).isdisjoint(others)


def _with_parents(paths: Iterable[str]) -> set[str]:
    """Return the paths, and all folders that they are in."""
    found = set[str]()
    for path in paths:
        one = path
        while one and one not in found:
            found.add(one)
            one = one.rpartition("/")[0]
    return found


def _files_under_attributes(stamps: TreeSnapshot, paths: Iterable[str]) -> set[str]:
    """Return the files that those of the paths speak of that say how files are to be written."""
    rules = [path for path in paths if path.rpartition("/")[2] == ".gitattributes"]
    folders = tuple(path.removesuffix(".gitattributes") for path in rules)
    return {path + name for path, one in stamps.folders.items() if path.startswith(folders) for name in one.files}


def _lay_out(place: WorktreeSlot, sparse: Sequence[str], index: Path | None) -> None:
    place.root.mkdir(mode=0o700, exist_ok=True)
    for folder in (place.tree, place.git_dir, place.git_dir / "info", place.scratch):
        folder.mkdir()
    # gitrepository-layout(5): all but HEAD, the index and a few files of `info` is where `commondir` leads.
    (place.git_dir / "commondir").write_text(f"{place.hub.trusted}\n")
    (place.git_dir / "HEAD").write_text("ref: refs/heads/none\n")
    if sparse:
        (place.git_dir / "info" / "sparse-checkout").write_text(format_sparse_patterns(sparse))
    if index is not None:
        shutil.copyfile(index, place.index)


def format_sparse_patterns(folders: Iterable[str]) -> str:
    """Return what git-sparse-checkout(1) writes in cone mode for these folders, all that is in them included."""
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


def _remove(place: WorktreeSlot, touched: Iterable[str], paths: Iterable[str]) -> None:
    tree = place.tree
    mode = stat.S_IMODE(place.git_dir.stat().st_mode)  # made as the checkout was, and no session could change it
    for path in sorted(touched):
        _restore_folder_mode(tree / path.strip("/"), mode)
    for path in (".git", *paths):
        _remove_one(place, tree / path.rstrip("/"))


def _restore_folder_mode(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    # What a folder hands on to the files in it is an extended attribute, too (acl(5)).
    for name in os.listxattr(folder, follow_symlinks=False) if hasattr(os, "listxattr") else ():
        if not name.startswith("security."):
            os.removexattr(folder, name, follow_symlinks=False)


def _remove_one(place: WorktreeSlot, path: Path) -> None:
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            path.chmod(0o700)  # else it can't be moved to another folder
            move_to_trash(place.hub, path)
        else:
            path.unlink()


def _make_folders(tree: Path, paths: Iterable[str]) -> None:
    for path in paths:
        (tree / path).mkdir(parents=True, exist_ok=True)
