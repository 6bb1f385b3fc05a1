"""What may come in from an agent: no secret and no huge file, judged by name, by size and by content."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.domain.security.reserved_names import find_reserved_name
from orchestrator.domain.security.secrets import Redactor, is_secret_file, secret_values
from orchestrator.errors import GitError
from orchestrator.repo.git.command import GITLINK_MODE, FileChange, Git, printable_name
from orchestrator.repo.git.loose_objects import LooseObject, read_loose_object

MAX_FILE_BYTES = 50 << 20  # bytes: what the large hosts take without a warning
#: Bytes and files of a session's changes in all: git stages so much within its time limit.
MAX_TOTAL_BYTES, MAX_FILES = 1 << 30, 200_000
_WITHOUT_CONTENT = frozenset({GITLINK_MODE, "040000"})  # what has a name and nothing to read: others, and folders
# What means something else in a .gitignore; see gitignore(5).
_SPECIAL, _ESCAPED = re.compile(r"[\\*?\[ ]"), r"\\\g<0>"
_BATCH_BYTES = 32 << 20  # bytes of content that are read at a time


@dataclass(frozen=True, slots=True)
class IntakeRules:
    """The rules: the largest file in bytes, and the values that no file may have.

    `leavings` are patterns, as in a .gitignore, of files that are no work where the base does not have them. `withheld`
    are the paths of what we put into worktrees: nothing at or beneath them is work, and it may be in no commit.
    """

    redactor: Redactor
    max_file: int = MAX_FILE_BYTES
    scratch_patterns: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()
    max_total: int = MAX_TOTAL_BYTES
    max_files: int = MAX_FILES

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> IntakeRules:
        """Return the rules that keep the secrets of this environment out."""
        return cls(Redactor(secret_values(environ)))

    def check_file(self, path: str, size: int) -> str | None:
        """Return why a file of this name and size (bytes) may not come in, None if it may."""
        if why := self.check_name(path):
            return why
        if is_secret_file(path):
            return "its name is that of a file for secrets"
        if above := next((one for one in self.withheld if one.startswith(f"{path}/")), None):
            return f"it is where the folder of {printable_name(above)!r} must be"
        if size > self.max_file:
            return f"it has {size} bytes, more than {self.max_file}"
        return None

    def check_total(self, files: int, size: int) -> str | None:
        """Return why so many changed files of so many bytes in all may not come in, None if they may."""
        if files <= self.max_files and size <= self.max_total:
            return None
        return f"too much to stage: {files} files of {size} bytes, {self.max_files} of {self.max_total} fit"

    def check_name(self, path: str) -> str | None:
        """Return why nothing of this name may come in, a folder neither; None if it may."""
        if self.find_withheld(path) is not None:
            return "it was put into the worktree from your checkout (`worktrees.copy` and `link`)"
        if (name := find_reserved_name(path)) is not None:
            return f"{name} is reserved: what is in it would be obeyed, not only read"
        return "its name holds a secret" if self.redactor.find_secrets(os.fsencode(path)) else None

    def find_withheld(self, path: str) -> str | None:
        """Return what we put where a path is or leads through, whatever became of it; None if nothing."""
        return next((one for one in self.withheld if path == one or path.startswith(f"{one}/")), None)

    @property
    def ignored(self) -> list[str]:
        """The patterns, as in a .gitignore, of what is no work."""
        return [*self.scratch_patterns, *(f"/{_SPECIAL.sub(_ESCAPED, path)}" for path in self.withheld)]


async def find_rejected_paths(
    git: Git, changes: Iterable[FileChange], admit: IntakeRules, env: Mapping[str, str], loose: Sequence[Path] = ()
) -> dict[str, str]:
    """Return the paths of those changes that may not come in, each with the reason.

    `old_id` of a change is what the base has at the path: a secret that is there already is nothing new. Git runs
    with `env`, which says where the objects are; what is in the folders `loose` is read without it. No
    more than some 32 MiB or one file are in memory at once.
    """
    there = [one for one in changes if one.new_id != one.old_id and int(one.new_mode, 8)]
    named = {one.path: why for one in there if (why := admit.check_name(one.path))}
    news = [one for one in there if one.new_mode not in _WITHOUT_CONTENT]
    objects = _Objects(git, env, loose)
    sizes = await objects.sizes({one.new_id for one in news})
    refused = named | {one.path: why for one in news if (why := admit.check_file(one.path, sizes[one.new_id]))}
    left = [one for one in news if one.path not in refused]
    found: dict[str, set[bytes]] = {}
    for batch in _batches(sorted({one.new_id for one in left}), sizes):
        found |= await objects.find(batch, admit.redactor)
    for one in left:
        if found.get(one.new_id) and found[one.new_id] - await objects.known(one.old_id, admit.redactor):
            refused[one.path] = "it holds a secret"
    return refused


@dataclass(frozen=True, slots=True)
class _Objects:
    """Reads objects: those in the folders `loose` that are files there, the others by git with `env`."""

    git: Git
    env: Mapping[str, str]
    loose: Sequence[Path]

    async def sizes(self, ids: Collection[str]) -> dict[str, int]:
        """Return how many bytes each has; GitError if one is missing."""
        found = await anyio.to_thread.run_sync(self._sizes_of_files, ids)
        listed = "".join(f"{name}\n" for name in ids if name not in found).encode()
        if not listed:
            return found
        done = await self.git("cat-file", "--batch-check=%(objectname) %(objectsize)", env=self.env, input_=listed)
        pairs = [line.split() for line in done.stdout.decode().splitlines()]
        missing = [name for name, size in pairs if not size.isdigit()]
        if missing:
            raise GitError(["cat-file"], 0, f"{missing[0]} is missing")
        return found | {name: int(size) for name, size in pairs}

    async def find(self, ids: Iterable[str], redactor: Redactor) -> dict[str, set[bytes]]:
        """Return the secrets that are in each that has some."""
        contents = await anyio.to_thread.run_sync(self._contents_of_files, ids)
        found = await anyio.to_thread.run_sync(_find, contents, redactor)
        listed = "".join(f"{name}\n" for name in ids if name not in contents).encode()
        if not listed:
            return found
        done = await self.git("cat-file", "--batch", env=self.env, input_=listed)
        return found | await anyio.to_thread.run_sync(lambda: _find(_contents(done.stdout), redactor))

    async def known(self, base_id: str, redactor: Redactor) -> set[bytes]:
        """Return the secrets that are in one that may be nothing (all zeros)."""
        if not base_id.strip("0"):
            return set()
        return (await self.find([base_id], redactor)).get(base_id, set())

    def _sizes_of_files(self, ids: Iterable[str]) -> dict[str, int]:
        read = {name: self._read(name, 0) for name in ids}
        return {name: one.size for name, one in read.items() if one is not None}

    def _contents_of_files(self, ids: Iterable[str]) -> dict[str, bytes]:
        read = {name: self._read(name) for name in ids}
        return {name: one.content for name, one in read.items() if one is not None}

    def _read(self, name: str, most: int | None = None) -> LooseObject | None:
        found = (read_loose_object(folder, name, most) for folder in self.loose)
        return next((one for one in found if one is not None), None)


def _batches(ids: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    total = 0
    for name in ids:
        if batch and total + sizes[name] > _BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += sizes[name]
    if batch:
        yield batch


def _find(contents: Mapping[str, bytes], redactor: Redactor) -> dict[str, set[bytes]]:
    return {name: secrets for name, content in contents.items() if (secrets := redactor.find_secrets(content))}


def _contents(output: bytes) -> dict[str, bytes]:
    """Read what `git cat-file --batch` printed: for each object a line with its size, then its content."""
    found = {}
    at = 0
    while at < len(output):
        end = output.index(b"\n", at)
        name, _, size = output[at:end].split()
        found[name.decode()] = output[end + 1 : end + 1 + int(size)]
        at = end + 1 + int(size) + 1
    return found
