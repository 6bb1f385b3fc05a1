"""Decide which agent files are accepted: no secrets, no huge files."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.domain.security.secrets import Redactor, is_secret_file, secret_values
from orchestrator.errors import GitError
from orchestrator.repo.git.blobs import batch_by_size, cat_blobs, parse_blobs
from orchestrator.repo.git.command import GITLINK_MODE, LINK_MODE, FileChange, Git, printable_name, split_nul
from orchestrator.repo.git.loose_objects import LooseObject, read_loose_object
from orchestrator.repo.git.unsupported_files import can_be_checked_out, find_unsupported_attributes

MAX_FILE_BYTES = 50 << 20  # the large git hosts accept this size without a warning
#: Maximum total bytes and files of a session's changes, chosen so that git can stage them within its time limit.
MAX_TOTAL_BYTES, MAX_FILES = 1 << 30, 200_000
_WITHOUT_CONTENT = frozenset({GITLINK_MODE, "040000"})  # repositories and folders are inspected by name only
_SUBMODULES, _ATTRIBUTES, _SEPARATORS = ".gitmodules", ".gitattributes", re.compile(r"[\\/]")
# Characters with a special meaning in a .gitignore; see gitignore(5).
_SPECIAL, _ESCAPED = re.compile(r"[\\*?\[ ]"), r"\\\g<0>"
_ENCODING_REASON = "it sets `working-tree-encoding`: git could not commit files in another encoding"
_BATCH_BYTES = 32 << 20  # bytes of content per read
#: Characters that HFS+ ignores when it compares names (git's `next_hfs_char`, CVE-2014-9390).
_IGNORED: Final = dict.fromkeys([*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x206A, 0x2070), 0xFEFF])
#: The NTFS short names of these folders (CVE-2019-1352).
_SHORT: Final = re.compile(r"(git|counci|worktr)~\d+")
_LONG: Final = {"git": ".git", "counci": ".council", "worktr": ".worktrees"}


@dataclass(frozen=True, slots=True)
class IntakeRules:
    """The maximum file size (bytes), and the secrets that no file may contain.

    `scratch_patterns` are .gitignore patterns of files that are not collected unless the base has them. `withheld` are
    the paths that we provide in worktrees: nothing at or below them is collected or may be in a commit.
    """

    redactor: Redactor
    max_file: int = MAX_FILE_BYTES
    scratch_patterns: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()
    max_total: int = MAX_TOTAL_BYTES
    max_files: int = MAX_FILES

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> IntakeRules:
        """Return the rules that exclude the secrets in this environment."""
        return cls(Redactor(secret_values(environ)))

    def check_file(self, path: str, size: int) -> str | None:
        """Return the reason to reject a file of this name and size (bytes), or None."""
        if reason := self.check_name(path):
            return reason
        if is_secret_file(path):
            return "its name is that of a secrets file"
        if below := next((withheld for withheld in self.withheld if withheld.startswith(f"{path}/")), None):
            return f"it replaces a folder above {printable_name(below)!r}, which council provides"
        if size > self.max_file:
            return f"it has {size} bytes (limit: {self.max_file})"
        return None

    def check_total(self, files: int, size: int) -> str | None:
        """Return the reason to reject this number of changed files and bytes, or None."""
        if files <= self.max_files and size <= self.max_total:
            return None
        limits = f"limits: {self.max_files} files, {self.max_total} bytes"
        return f"too much to stage: {files} files, {size} bytes in total ({limits})"

    def check_name(self, path: str) -> str | None:
        """Return the reason to reject a file or folder of this name, or None."""
        if self.find_withheld(path) is not None:
            return "council provides it from your checkout (`worktrees.copy` or `worktrees.link`)"
        if (name := find_reserved_name(path)) is not None:
            return f"{name} is reserved: programs would act on its contents"
        if not can_be_checked_out(os.fsencode(path)):
            return "its name is too long to be checked out"
        return "its name contains a secret" if self.redactor.find_secrets(os.fsencode(path)) else None

    def find_withheld(self, path: str) -> str | None:
        """Return the withheld path at or above a path, or None."""
        return next((top for top in self.withheld if path == top or path.startswith(f"{top}/")), None)

    @property
    def ignored(self) -> list[str]:
        """The .gitignore patterns of files that are not collected."""
        return [*self.scratch_patterns, *(f"/{_SPECIAL.sub(_ESCAPED, path)}" for path in self.withheld)]


async def find_rejected_paths(
    git: Git, changes: Iterable[FileChange], rules: IntakeRules, env: Mapping[str, str], loose: Sequence[Path] = ()
) -> dict[str, str]:
    """Return the changed paths to reject, each with a reason.

    Secrets that the base's object (`old_id` of the change) already contains are allowed. Git runs with `env`, which
    locates the objects; objects in the folders `loose` are read without git. At most about 32 MiB, or one file, are in
    memory at a time.
    """
    present = [change for change in changes if change.new_id != change.old_id and int(change.new_mode, 8)]
    by_name = {change.path: reason for change in present if (reason := rules.check_name(change.path))}
    files = [change for change in present if change.new_mode not in _WITHOUT_CONTENT]
    objects = _Objects(git, env, loose)
    sizes = await objects.sizes({file.new_id for file in files})
    refused = by_name | {
        file.path: reason for file in files if (reason := rules.check_file(file.path, sizes[file.new_id]))
    }
    described = [file for file in files if file.path.rpartition("/")[2].lower() == _SUBMODULES]
    checked = {file.path: await _check_submodules(git, file, env) for file in described if file.path not in refused}
    refused |= {path: reason for path, reason in checked.items() if reason is not None}
    attributes = [file for file in files if file.path.rpartition("/")[2] == _ATTRIBUTES and file.path not in refused]
    refused |= await _check_attributes(git, attributes, env)
    remaining = [file for file in files if file.path not in refused]
    secrets: dict[str, set[bytes]] = {}
    sized = ((blob, sizes[blob]) for blob in sorted({file.new_id for file in remaining}))
    for batch in batch_by_size(sized, _BATCH_BYTES):
        secrets |= await objects.find(batch, rules.redactor)
    for file in remaining:
        if secrets.get(file.new_id) and secrets[file.new_id] - await objects.known(file.old_id, rules.redactor):
            refused[file.path] = "it contains a secret"
    return refused


async def _check_attributes(git: Git, files: Sequence[FileChange], env: Mapping[str, str]) -> dict[str, str]:
    """Return the .gitattributes to reject, each with a reason. Lines of the base's version are allowed."""
    blobs = {blob for file in files for blob in (file.old_id, file.new_id) if blob.strip("0")}
    lines = await find_unsupported_attributes(git, blobs, env)
    added = {file.path: lines.get(file.new_id, set()) - lines.get(file.old_id, set()) for file in files}
    return {
        path: _ENCODING_REASON if all("filter=lfs" not in line for line in found) else "git LFS is not supported"
        for path, found in added.items()
        if found
    }


async def _check_submodules(git: Git, file: FileChange, env: Mapping[str, str]) -> str | None:
    """Return the reason for `git fsck` and servers to reject .gitmodules, or None."""
    if file.new_mode == LINK_MODE:
        return "it is a symbolic link, which git rejects"
    listed = await git("config", "--null", "--list", "--blob", file.new_id, env=env, ok=(0, 1, 128))
    for entry in split_nul(listed.stdout):
        key, _, value = entry.partition("\n")
        section, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        is_option = field in {"url", "path"} and value.startswith("-")
        is_command = field == "update" and value.startswith("!")
        is_outside = not name or ".." in _SEPARATORS.split(name)
        if section == "submodule" and rest.count(".") and (is_option or is_command or is_outside or "\n" in value):
            return f"git rejects its `{key}`, which could run a command or write outside the repository"
    return None


@dataclass(frozen=True, slots=True)
class _Objects:
    """Reads objects: loose ones from the folders `loose`, others with git and `env`."""

    git: Git
    env: Mapping[str, str]
    loose: Sequence[Path]

    async def sizes(self, ids: Collection[str]) -> dict[str, int]:
        """Return the size of each object in bytes. Raises GitError if one is missing."""
        sizes = await anyio.to_thread.run_sync(self._sizes_of_files, ids)
        listed = "".join(f"{name}\n" for name in ids if name not in sizes).encode()
        if not listed:
            return sizes
        done = await self.git("cat-file", "--batch-check=%(objectname) %(objectsize)", env=self.env, input_=listed)
        pairs = [line.split() for line in done.stdout.decode().splitlines()]
        missing = [name for name, size in pairs if not size.isdigit()]
        if missing:
            raise GitError(["cat-file"], 0, f"object {missing[0]} is missing")
        return sizes | {name: int(size) for name, size in pairs}

    async def find(self, ids: Iterable[str], redactor: Redactor) -> dict[str, set[bytes]]:
        """Return the secrets found, keyed by object."""
        secrets, packed = await anyio.to_thread.run_sync(self._find_in_files, ids, redactor)
        if not packed:
            return secrets
        output = await cat_blobs(self.git, packed, self.env)
        return secrets | await anyio.to_thread.run_sync(_find_in_output, output, redactor)

    async def known(self, base_id: str, redactor: Redactor) -> set[bytes]:
        """Return the secrets in an object; empty for the null id (all zeros)."""
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

    def _read(self, name: str, limit: int | None = None) -> LooseObject | None:
        objects = (read_loose_object(folder, name, limit) for folder in self.loose)
        return next((loose for loose in objects if loose is not None), None)


def _find(contents: Mapping[str, bytes], redactor: Redactor) -> dict[str, set[bytes]]:
    return {name: secrets for name, content in contents.items() if (secrets := redactor.find_secrets(content))}


def _find_in_output(output: bytes, redactor: Redactor) -> dict[str, set[bytes]]:
    return _find({name: bytes(content) for name, content in parse_blobs(output)}, redactor)


def find_reserved_name(path: str) -> str | None:
    """Return a segment's reserved name, also on macOS and Windows, or None.

    NTFS also treats a backslash as a separator, and ends a name before a colon and before trailing dots and spaces.
    """
    return next((name for part in re.split(r"[/\\]", path) if (name := _reserved_name(part)) is not None), None)


def _reserved_name(part: str) -> str | None:
    folded = part.translate(_IGNORED).casefold()
    plain = folded.partition(":")[0].rstrip(". ")
    if short := _SHORT.fullmatch(plain):
        return _LONG[short[1]]
    return plain if plain in _LONG.values() else None
