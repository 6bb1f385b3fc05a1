"""Refuse unsupported repositories with a specific error before a run starts."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio.to_thread

from orchestrator.domain.wording import join_names
from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.git.unsupported_files import can_be_checked_out, find_lfs_files
from orchestrator.repo.source.user_checkouts import LocalRepository

_PARTIAL = r"^(extensions\.partialclone|remote\..*\.promisor)$"


async def check_supported(git: Git, commit: str) -> None:
    """Raise RefusedError for a commit that sessions could not check out faithfully.

    Such a commit has submodules, git LFS, or names that can't be checked out in the hub. `git` runs in the trusted
    repository, which has the commit and is on the same file system as the sessions.
    """
    listed = (await git("ls-tree", "-r", "-z", "--full-tree", commit)).stdout
    _check_submodules(listed)
    folder = git.git_dir
    folds_case = folder is not None and await anyio.to_thread.run_sync(is_case_insensitive, folder)
    paths = [entry.partition(b"\t")[2] for entry in listed.split(b"\0")[:-1]]
    await anyio.to_thread.run_sync(partial(check_file_names, paths, folds_case=folds_case))
    await _check_lfs(git, commit)


def check_file_names(paths: Sequence[bytes], *, folds_case: bool) -> None:
    """Raise RefusedError for paths that can't be checked out.

    `folds_case` adds the rules of case-insensitive file systems.
    """
    invalid = [path for path in paths if not can_be_checked_out(path)]
    if invalid:
        raise RefusedError(
            f"{_listed(invalid)} can't be checked out: a name is reserved or too long",
            "rename it with `git mv`, or set `base` to a branch without it",
        )
    if folds_case:
        _check_folded(paths)


def is_case_insensitive(folder: Path) -> bool:
    """Return whether a folder's file system ignores the case of names. Writes nothing."""
    for path in (folder, *folder.parents):
        other = path.with_name(path.name.swapcase()) if path.name else path
        if other != path:
            return other.exists() and other.samefile(path)
    return False


async def check_complete_clone(repository: LocalRepository, git: Git) -> None:
    """Raise RefusedError for a clone that lacks objects. Call before fetching from it."""
    folder = repository.folder
    shallow = await git("rev-parse", "--is-shallow-repository", cwd=folder)
    if shallow.stdout.strip() == b"true":
        raise RefusedError(f"{folder} is a shallow clone", "complete it with `git fetch --unshallow`")
    matching = await git("config", "--local", "-z", "--get-regexp", _PARTIAL, cwd=folder, ok=(0, 1))
    entries = [entry.partition("\n")[::2] for entry in matching.stdout.decode(errors="replace").split("\0")[:-1]]
    keys = [key for key, value in entries if value.lower() not in {"false", "no", "off", "0"}]
    if keys:
        unset = " and ".join(f"`git config --unset {key}`" for key in keys)
        remedy = f"complete it with `git fetch --refetch --no-filter`, then {unset}"
        raise RefusedError(f"{folder} is a partial clone, which lacks objects", remedy)


def _check_submodules(listed: bytes) -> None:
    if b"160000 commit " not in listed:
        return
    links = [entry.partition(b"\t")[2] for entry in listed.split(b"\0") if entry.startswith(b"160000 ")]
    if links:
        raise RefusedError(
            f"submodules are not supported: {_listed(links)}",
            "set `base` and `target` to a branch without submodules (`git rm` removes one)",
        )


async def _check_lfs(git: Git, commit: str) -> None:
    if files := await find_lfs_files(git, commit):
        raise RefusedError(
            f"git LFS is not supported: {_listed(files)} has `filter=lfs`",
            "set `base` and `target` to a branch without `filter=lfs`",
        )


def _check_folded(paths: Sequence[bytes]) -> None:
    known: dict[str, bytes] = {}
    for path in paths:
        try:
            folded = unicodedata.normalize("NFC", path.decode()).casefold()
        except UnicodeDecodeError:
            raise RefusedError(
                f"{_listed([path])} is not UTF-8, which the file system of COUNCIL_HOME requires",
                "set COUNCIL_HOME to a folder on another file system",
            ) from None
        # A file and a folder on another path may also collide.
        for name, spelling in _with_parents(folded, path):
            if known.setdefault(name, spelling) != spelling:
                message = (
                    f"{_listed([known[name], spelling])} differ only in case, which COUNCIL_HOME's file system ignores"
                )
                raise RefusedError(message, "set COUNCIL_HOME to a folder on a case-sensitive file system")


def _with_parents(folded: str, path: bytes) -> list[tuple[str, bytes]]:
    ends = [index for index, character in enumerate(path) if character == ord("/")] + [len(path)]
    segments = folded.split("/")
    return [("/".join(segments[: depth + 1]), path[:end]) for depth, end in enumerate(ends)]


def _listed(paths: Sequence[bytes], limit: int = 3) -> str:
    return join_names([printable_name(os.fsdecode(path)) for path in paths], limit)
