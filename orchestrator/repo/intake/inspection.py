"""Decide which files of an agent may enter: no secrets and no huge files, judged by name, size and content."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from orchestrator.domain.security.reserved_names import find_reserved_name
from orchestrator.domain.security.secrets import Redactor, is_secret_file, secret_values
from orchestrator.errors import GitError
from orchestrator.repo.git.blobs import batch_by_size, cat_blobs, parse_blobs
from orchestrator.repo.git.command import GITLINK_MODE, LINK_MODE, FileChange, Git, printable_name, split_nul
from orchestrator.repo.git.loose_objects import LooseObject, read_loose_object

MAX_FILE_BYTES = 50 << 20  # the large hosts accept this without a warning
#: Total bytes and files of a session's changes, which git can stage within its time limit.
MAX_TOTAL_BYTES, MAX_FILES = 1 << 30, 200_000
_WITHOUT_CONTENT = frozenset({GITLINK_MODE, "040000"})  # repositories and folders: they have a name only
_SUBMODULES, _SEPARATORS = ".gitmodules", re.compile(r"[\\/]")
# Characters with a special meaning in a .gitignore; see gitignore(5).
_SPECIAL, _ESCAPED = re.compile(r"[\\*?\[ ]"), r"\\\g<0>"
_BATCH_BYTES = 32 << 20  # bytes of content to read at a time


@dataclass(frozen=True, slots=True)
class IntakeRules:
    """The rules: the largest file in bytes, and the secrets that no file may contain.

    `scratch_patterns` are .gitignore patterns of files that are not work unless the base has them. `withheld` are the
    paths that we provide in worktrees: nothing at or below them is work, and no commit may contain it.
    """

    redactor: Redactor
    max_file: int = MAX_FILE_BYTES
    scratch_patterns: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()
    max_total: int = MAX_TOTAL_BYTES
    max_files: int = MAX_FILES

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> IntakeRules:
        """Return the rules that exclude the secrets of this environment."""
        return cls(Redactor(secret_values(environ)))

    def check_file(self, path: str, size: int) -> str | None:
        """Return why a file of this name and size (bytes) may not enter, None if it may."""
        if why := self.check_name(path):
            return why
        if is_secret_file(path):
            return "its name is that of a secrets file"
        if below := next((withheld for withheld in self.withheld if withheld.startswith(f"{path}/")), None):
            return f"it replaces a folder above {printable_name(below)!r}, which council provides"
        if size > self.max_file:
            return f"it has {size} bytes, more than the limit of {self.max_file}"
        return None

    def check_total(self, files: int, size: int) -> str | None:
        """Return why this number of changed files and bytes may not enter, None if it may."""
        if files <= self.max_files and size <= self.max_total:
            return None
        return f"too much to stage: {files} files of {size} bytes, the limit is {self.max_files} of {self.max_total}"

    def check_name(self, path: str) -> str | None:
        """Return why no file or folder of this name may enter, None if it may."""
        if self.find_withheld(path) is not None:
            return "it was put into the worktree from your checkout (`worktrees.copy` and `link`)"
        if (name := find_reserved_name(path)) is not None:
            return f"{name} is reserved: programs would act on its contents"
        return "its name contains a secret" if self.redactor.find_secrets(os.fsencode(path)) else None

    def find_withheld(self, path: str) -> str | None:
        """Return the withheld path at or above a path, None if there is none."""
        return next((top for top in self.withheld if path == top or path.startswith(f"{top}/")), None)

    @property
    def ignored(self) -> list[str]:
        """The .gitignore patterns of files that are not work."""
        return [*self.scratch_patterns, *(f"/{_SPECIAL.sub(_ESCAPED, path)}" for path in self.withheld)]


async def find_rejected_paths(
    git: Git, changes: Iterable[FileChange], admit: IntakeRules, env: Mapping[str, str], loose: Sequence[Path] = ()
) -> dict[str, str]:
    """Return the changed paths that may not enter, each with the reason.

    `old_id` of a change is the base's object at the path: a secret that is there already is not new. Git runs with
    `env`, which gives the location of the objects; objects in the folders `loose` are read without git. At most about
    32 MiB or one file are in memory at a time.
    """
    present = [change for change in changes if change.new_id != change.old_id and int(change.new_mode, 8)]
    by_name = {change.path: why for change in present if (why := admit.check_name(change.path))}
    files = [change for change in present if change.new_mode not in _WITHOUT_CONTENT]
    objects = _Objects(git, env, loose)
    sizes = await objects.sizes({file.new_id for file in files})
    refused = by_name | {file.path: why for file in files if (why := admit.check_file(file.path, sizes[file.new_id]))}
    described = [file for file in files if file.path.rpartition("/")[2].lower() == _SUBMODULES]
    checked = {file.path: await _check_submodules(git, file, env) for file in described if file.path not in refused}
    refused |= {path: why for path, why in checked.items() if why is not None}
    remaining = [file for file in files if file.path not in refused]
    secrets: dict[str, set[bytes]] = {}
    sized = ((blob, sizes[blob]) for blob in sorted({file.new_id for file in remaining}))
    for batch in batch_by_size(sized, _BATCH_BYTES):
        secrets |= await objects.find(batch, admit.redactor)
    for file in remaining:
        if secrets.get(file.new_id) and secrets[file.new_id] - await objects.known(file.old_id, admit.redactor):
            refused[file.path] = "it contains a secret"
    return refused


async def _check_submodules(git: Git, file: FileChange, env: Mapping[str, str]) -> str | None:
    """Return why `git fsck` would reject a description of submodules, and so would a server; None if it would not."""
    if file.new_mode == LINK_MODE:
        return "it is a symbolic link: git rejects that"
    listed = await git("config", "--null", "--list", "--blob", file.new_id, env=env, ok=(0, 1, 128))
    for entry in split_nul(listed.stdout):
        key, _, value = entry.partition("\n")
        section, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        is_option = field in {"url", "path"} and value.startswith("-")
        is_command = field == "update" and value.startswith("!")
        is_outside = not name or ".." in _SEPARATORS.split(name)
        if section == "submodule" and rest.count(".") and (is_option or is_command or is_outside or "\n" in value):
            return f"git rejects its `{key}`: it could run a command or write outside of the repository"
    return None


@dataclass(frozen=True, slots=True)
class _Objects:
    """Reads objects: loose ones from the folders `loose`, others by git with `env`."""

    git: Git
    env: Mapping[str, str]
    loose: Sequence[Path]

    async def sizes(self, ids: Collection[str]) -> dict[str, int]:
        """Return the size of each object in bytes; GitError if one is missing."""
        sizes = await anyio.to_thread.run_sync(self._sizes_of_files, ids)
        listed = "".join(f"{name}\n" for name in ids if name not in sizes).encode()
        if not listed:
            return sizes
        done = await self.git("cat-file", "--batch-check=%(objectname) %(objectsize)", env=self.env, input_=listed)
        pairs = [line.split() for line in done.stdout.decode().splitlines()]
        missing = [name for name, size in pairs if not size.isdigit()]
        if missing:
            raise GitError(["cat-file"], 0, f"{missing[0]} is missing")
        return sizes | {name: int(size) for name, size in pairs}

    async def find(self, ids: Iterable[str], redactor: Redactor) -> dict[str, set[bytes]]:
        """Return the secrets in each object that has some."""
        secrets, packed = await anyio.to_thread.run_sync(self._find_in_files, ids, redactor)
        if not packed:
            return secrets
        output = await cat_blobs(self.git, packed, self.env)
        return secrets | await anyio.to_thread.run_sync(_find_in_output, output, redactor)

    async def known(self, base_id: str, redactor: Redactor) -> set[bytes]:
        """Return the secrets in an object; none for the null id (all zeros)."""
        if not base_id.strip("0"):
            return set()
        return (await self.find([base_id], redactor)).get(base_id, set())

    def _sizes_of_files(self, ids: Iterable[str]) -> dict[str, int]:
        read = {name: self._read(name, 0) for name in ids}
        return {name: loose.size for name, loose in read.items() if loose is not None}

    def _find_in_files(self, ids: Iterable[str], redactor: Redactor) -> tuple[dict[str, set[bytes]], list[str]]:
        """Return the secrets in loose objects, and the ids of the other objects."""
        read = {name: self._read(name) for name in ids}
        contents = {name: loose.content for name, loose in read.items() if loose is not None}
        return _find(contents, redactor), [name for name in read if name not in contents]

    def _read(self, name: str, most: int | None = None) -> LooseObject | None:
        objects = (read_loose_object(folder, name, most) for folder in self.loose)
        return next((loose for loose in objects if loose is not None), None)


def _find(contents: Mapping[str, bytes], redactor: Redactor) -> dict[str, set[bytes]]:
    return {name: secrets for name, content in contents.items() if (secrets := redactor.find_secrets(content))}


def _find_in_output(output: bytes, redactor: Redactor) -> dict[str, set[bytes]]:
    return _find({name: bytes(content) for name, content in parse_blobs(output)}, redactor)
