"""What kinds of repositories a run is refused on, by name, before it starts."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio.to_thread

from orchestrator.errors import RefusedError
from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.source.user_checkouts import LocalRepository

#: Bytes: what Linux and macOS allow for a name, and for a path less what sessions' folders take (NAME_MAX, PATH_MAX).
_LONGEST_NAME, _LONGEST_PATH = 255, 3500

#: `.git` in the spellings that git itself does not check out; see core.protectNTFS in git-config(1).
_RESERVED = re.compile(rb"(?:\.|\.\.|(?:\.git|git~1)[ .]*(?::.*)?)", re.IGNORECASE | re.DOTALL)
_LFS = r"^[[:space:]]*[^#[:space:]].*[[:space:]]filter=lfs([[:space:]]|$)"
_PARTIAL = r"^(extensions\.partialclone|remote\..*\.promisor)$"


async def check_supported(git: Git, commit: str) -> None:
    """Refuse (RefusedError) a commit that sessions could not work on faithfully.

    That is one with submodules, git LFS, or names that can't be checked out where sessions are. `git` runs in the
    trusted repository, which has the commit and lies where sessions will.
    """
    listed = (await git("ls-tree", "-r", "-z", "--full-tree", commit)).stdout
    _check_submodules(listed)
    folder = git.git_dir
    folds_case = folder is not None and await anyio.to_thread.run_sync(is_case_insensitive, folder)
    paths = [entry.partition(b"\t")[2] for entry in listed.split(b"\0")[:-1]]
    await anyio.to_thread.run_sync(partial(check_file_names, paths, folds_case=folds_case))
    await _check_lfs(git, commit)


def check_file_names(paths: Sequence[bytes], *, folds_case: bool) -> None:
    """Refuse paths that can't be checked out; with `folds_case`, on a file system that ignores case, more can't."""
    odd = [path for path in paths if len(path) > _LONGEST_PATH or any(map(_is_impossible, path.split(b"/")))]
    if odd:
        raise RefusedError(
            f"{_listed(odd)} can't be checked out: a name is reserved or too long",
            "rename it with `git mv`, or set `base` to a branch without it",
        )
    if folds_case:
        _check_folded(paths)


def is_case_insensitive(folder: Path) -> bool:
    """Whether the file system that a folder is on takes names that differ in case for the same; writes nothing."""
    for place in (folder, *folder.parents):
        other = place.with_name(place.name.swapcase()) if place.name else place
        if other != place:
            return other.exists() and other.samefile(place)
    return False


async def check_complete_clone(repository: LocalRepository, git: Git) -> None:
    """Refuse a clone of the user's that lacks objects; to be asked before anything is fetched from it."""
    place = repository.folder
    shallow = await git("rev-parse", "--is-shallow-repository", cwd=repository.folder)
    if shallow.stdout.strip() == b"true":
        raise RefusedError(f"{place} is a shallow clone", "complete it with `git fetch --unshallow`")
    found = await git("config", "--local", "-z", "--get-regexp", _PARTIAL, cwd=repository.folder, ok=(0, 1))
    entries = [entry.partition("\n")[::2] for entry in found.stdout.decode(errors="replace").split("\0")[:-1]]
    keys = [key for key, value in entries if value.lower() not in {"false", "no", "off", "0"}]
    if keys:
        unset = " and ".join(f"`git config --unset {key}`" for key in keys)
        remedy = f"complete it with `git fetch --refetch --no-filter`, then {unset}"
        raise RefusedError(f"{place} is a partial clone, which lacks objects", remedy)


def _check_submodules(listed: bytes) -> None:
    if b"160000 commit " not in listed:
        return
    links = [entry.partition(b"\t")[2] for entry in listed.split(b"\0") if entry.startswith(b"160000 ")]
    if links:
        raise RefusedError(
            f"there are submodules, which sessions would find empty: {_listed(links)}",
            "set `base` and `target` to a branch without them (`git rm` removes one)",
        )


async def _check_lfs(git: Git, commit: str) -> None:
    attributes = ":(top,glob)**/.gitattributes"
    matching = await git("grep", "-z", "-l", "-E", "-e", _LFS, commit, "--", attributes, ok=(0, 1))
    files = [name.partition(b":")[2] for name in matching.stdout.split(b"\0")[:-1]]
    if files:
        raise RefusedError(
            f"files are kept in git LFS, of which sessions would see pointers only: {_listed(files)} has `filter=lfs`",
            "set `base` and `target` to a branch whose .gitattributes do not have it",
        )


def _is_impossible(name: bytes) -> bool:
    return len(name) > _LONGEST_NAME or _RESERVED.fullmatch(name) is not None


def _check_folded(paths: Sequence[bytes]) -> None:
    known: dict[str, bytes] = {}
    for path in paths:
        try:
            folded = unicodedata.normalize("NFC", path.decode()).casefold()
        except UnicodeDecodeError:
            raise RefusedError(
                f"{_listed([path])} is not UTF-8, as the file system of COUNCIL_HOME wants names",
                "set COUNCIL_HOME to a folder on another file system",
            ) from None
        # A file, and a folder that another path goes through, may meet as well.
        for place, spelling in _with_parents(folded, path):
            if known.setdefault(place, spelling) != spelling:
                what = (
                    f"{_listed([known[place], spelling])} differ only in case, which COUNCIL_HOME's file system ignores"
                )
                raise RefusedError(what, "set COUNCIL_HOME to a folder on a case-sensitive file system")


def _with_parents(folded: str, path: bytes) -> list[tuple[str, bytes]]:
    ends = [index for index, character in enumerate(path) if character == ord("/")] + [len(path)]
    segments = folded.split("/")
    return [("/".join(segments[: depth + 1]), path[:end]) for depth, end in enumerate(ends)]


def _listed(paths: Sequence[bytes], most: int = 3) -> str:
    names = ", ".join(printable_name(os.fsdecode(path)) for path in paths[:most])
    return f"{names} and {len(paths) - most} more" if len(paths) > most else names
