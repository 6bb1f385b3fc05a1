"""Read a conflict of two commits: how git merges each conflicting file, and what a resolution changed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import anyio
import anyio.to_thread

from orchestrator.domain.runs.conflict_resolution import (
    ConflictingFile,
    find_resolution_problem,
    parse_conflicting_file,
)
from orchestrator.errors import RefusedError
from orchestrator.repo.git.blobs import cat_blobs, parse_blobs
from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.landing.merge_commits import temporary_folder

#: The modes of files whose content can be merged.
_FILE_MODES = ("100644", "100755")
_MAX_BYTES = 1_000_000
#: The maximum size of a resolved file.
MAX_RESOLVED_BYTES = 3 * _MAX_BYTES
_MAX_FILES = 100
#: A merge has at most this number of conflicts, by its exit code.
_MAX_CONFLICTS = 127


@dataclass(frozen=True, slots=True)
class ReadConflict:
    """A conflict in the content of files that both sides have."""

    base: str
    tree: str
    """The tree of git's merge, with conflict markers."""
    modes: Mapping[str, str]
    files: Mapping[str, ConflictingFile]
    texts: Mapping[str, tuple[bytes, bytes, bytes]]
    """The base and both sides of each file."""


async def read_conflict(git: Git, ours: str, theirs: str) -> ReadConflict:
    """Return the conflict of two commits; raise RefusedError if it isn't only in the content of text files."""
    tree, names = await git.merge_tree(ours, theirs)
    bases = (await git.line("merge-base", "--all", ours, theirs)).split()
    if len(bases) != 1 or len(names) > _MAX_FILES:
        raise _unsupported("several merge bases or too many conflicts")
    sides = [await git.entries(commit, names) for commit in (bases[0], ours, theirs)]
    modes, ids = dict[str, str](), dict[str, tuple[str | None, str, str]]()
    for name in names:
        base, one, other = (side[name].split() if name in side else None for side in sides)
        if one is None or other is None or one[0] not in _FILE_MODES or one[0] != other[0]:
            raise _unsupported(f"{name} was removed, renamed, or changed its type")
        modes[name], ids[name] = one[0], (None if base is None else base[2], one[2], other[2])
    blobs = dict.fromkeys(blob for row in ids.values() for blob in row if blob is not None)
    output = await cat_blobs(git, blobs)
    contents = {blob: bytes(content) for blob, content in parse_blobs(output)}
    files, texts = dict[str, ConflictingFile](), dict[str, tuple[bytes, bytes, bytes]]()
    for name, (blob, one_id, other_id) in ids.items():
        texts[name] = b"" if blob is None else contents[blob], contents[one_id], contents[other_id]
        if any(len(text) > _MAX_BYTES or b"\0" in text for text in texts[name]):
            raise _unsupported(f"{name} is binary or large")
        files[name] = await _merge(git, texts[name])
    if not files or not all(file.hunks for file in files.values()):
        raise _unsupported("it is not in the content of files")
    return ReadConflict(bases[0], tree, modes, files, texts)


async def find_problem(git: Git, conflict: ReadConflict, commit: str) -> str | None:
    """Return the reason to reject the resolution in `commit`, or None."""
    changed = await git.changes(conflict.tree, commit)
    if outside := next((each.path for each in changed if each.path not in conflict.files), None):
        return f"it changes {printable_name(outside)}, which does not conflict"
    entries = {path: entry.split() for path, entry in (await git.entries(commit, conflict.files)).items()}
    for name, file in conflict.files.items():
        if name not in entries or entries[name][0] != conflict.modes[name]:
            return f"it removes {name}, or changes its type"
        [(_, content)] = parse_blobs(await cat_blobs(git, [entries[name][2]]))
        if len(content) > MAX_RESOLVED_BYTES:
            return f"{name} is too large"
        # In a thread: comparing long hunks takes time.
        problem = await anyio.to_thread.run_sync(find_resolution_problem, file, bytes(content))
        if problem is not None:
            return f"{name}: {problem}"
    return None


async def _merge(git: Git, texts: tuple[bytes, bytes, bytes]) -> ConflictingFile:
    size = 64 + secrets.randbelow(1024)  # no author knows the length of the markers
    with temporary_folder(git) as folder:
        base, ours, theirs = [anyio.Path(folder, name) for name in ("base", "ours", "theirs")]
        for path, text in zip((base, ours, theirs), texts, strict=True):
            await path.write_bytes(text)
        paths = map(str, (ours, base, theirs))
        command = ("merge-file", "-p", "--diff3", f"--marker-size={size}", *paths)
        merged = await git(*command, ok=range(_MAX_CONFLICTS + 1))
    return parse_conflicting_file(merged.stdout, size)


def _unsupported(reason: str) -> RefusedError:
    return RefusedError(f"no session may resolve it: {reason}", "merge it yourself, or retry the task")
