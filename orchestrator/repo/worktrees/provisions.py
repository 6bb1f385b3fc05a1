"""Provide worktrees with untracked files of the user's checkout.

Files are copied again for each session, so that no session sees another's changes. Links point to the user's own files,
which the sandbox lets sessions read. No other process writes to the worktree, but earlier processes may have created
anything at a target path: it is removed, never followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final

import anyio.to_thread

from orchestrator.domain.security.secrets import is_secret_file, secret_values
from orchestrator.domain.settings.run_settings import PathAccess
from orchestrator.errors import GitError, is_resource_exhaustion
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.files.file_trees import copy_tree, is_folder, remove_all

_MAX_ENV_FILE_BYTES: Final = 1 << 20  # bytes
_ENV_FILES: Final = (".env", ".envrc")
_NAME: Final = r"^[ \t]*(?:export[ \t]+)?([A-Za-z_][\w.-]*)[ \t]*=[ \t]*"
_QUOTED: Final = re.compile(_NAME + r"""(?:"((?:[^"\\]|\\.)*)"|'([^']*)')""", re.MULTILINE | re.DOTALL)
_PLAIN: Final = re.compile(_NAME + r"([^\r\n]*)", re.MULTILINE)
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED: Final = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True, slots=True)
class ProvisionFailure:
    """A path that can't be provided in a worktree, with a remedy.

    `exhausted` means a possibly temporary lack of memory, disk, processes or descriptors.
    """

    message: str
    remedy: str
    exhausted: bool = False

    def __str__(self) -> str:
        return f"{self.message}: {self.remedy}"


@dataclass(frozen=True, slots=True)
class Provisions:
    """Paths of the user's `checkout` to copy or link into each worktree.

    Paths that are, contain or are inside one of the `hidden` files and folders are rejected.
    """

    checkout: Path
    copied: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()
    hidden: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths, which `IntakeRules` withholds."""
        return self.copied + self.linked

    def sources(self) -> list[Path]:
        """Return the user's files and folders that are provided."""
        return [self.checkout / path for path in self.paths]

    async def faults(self, commit: str, git: Git, named: str = "the commit") -> list[ProvisionFailure]:
        """Return the paths that can't be provided in a checkout of `commit`.

        Messages call the commit `named`. Each path must exist in the user's checkout and not in the commit. Its last
        component may be a link to any location. Parent folders must not be links, because landed commits could change
        them.
        """
        if not self.paths:
            return []
        return [*await self._committed(commit, git, named), *await anyio.to_thread.run_sync(self._check_all)]

    async def install_into(self, tree: Path, commit: str, git: Git) -> PathAccess | ProvisionFailure:
        """Copy and link everything into a checkout; return the paths to make readable.

        Programs in `tree`, a checkout of `commit`, must be able to read these paths. `git` runs in the trusted
        repository. Existing files are replaced. Modes, and links inside copied folders, are preserved.
        """
        if faults := await self.faults(commit, git):
            return faults[0]
        readable: list[Path] = []
        for path in self.paths:
            original = await anyio.to_thread.run_sync(os.path.realpath, self.checkout / path)
            try:
                target = await _clear(tree, path, git)
                if path in self.copied:
                    await copy_tree(original, target, git.environ, git.keep_fds, times=True)
                else:
                    await anyio.to_thread.run_sync(target.symlink_to, original)
                    readable.append(Path(original))
            except (OSError, GitError) as error:
                message, remedy = f"can't provide {path!r} in a worktree: {error}", f"check {self.checkout / path}"
                return ProvisionFailure(message, remedy, is_resource_exhaustion(error))
        return PathAccess(readable=tuple(readable))

    async def secrets(self) -> frozenset[str]:
        """Return the secret values in these files, to be redacted from all stored text.

        Reads NAME=value lines whose name looks secret, in each configured file and, in configured folders, in files
        named like a secrets file. Unreadable files are skipped.
        """
        return await anyio.to_thread.run_sync(self._read_secrets)

    def _key(self, path: str) -> str:
        return f"`worktrees.{'copy' if path in self.copied else 'link'}`"

    async def _committed(self, commit: str, git: Git, named: str) -> list[ProvisionFailure]:
        """Return the paths that the commit already has, or that are below its files."""
        asked = {*self.paths, *(folder for path in self.paths for folder in _folders(path))}
        kinds = {path: meta.split(" ")[1] for path, meta in (await git.entries(commit, asked)).items()}
        return [fault for path in self.paths for fault in self._check_committed(path, kinds, named)]

    def _check_committed(self, path: str, kinds: Mapping[str, str], named: str) -> Iterator[ProvisionFailure]:
        key = self._key(path)
        if path in kinds:
            yield ProvisionFailure(f"{path!r} is already in {named}", f"remove it from {key}: sessions see it anyway")
        for folder in _folders(path):
            if kinds.get(folder, "tree") != "tree":
                yield ProvisionFailure(f"{folder!r} is not a folder in {named}", f"remove {path!r} from {key}")

    def _check_all(self) -> list[ProvisionFailure]:
        hidden = [Path(os.path.realpath(path)) for path in self.hidden]
        checks = ((self._key(path), _check_path(self.checkout, path, hidden)) for path in self.paths)
        return [ProvisionFailure(f"{key}: {fault[0]}", fault[1]) for key, fault in checks if fault is not None]

    def _read_secrets(self) -> frozenset[str]:
        values: set[str] = set()
        for path in self.paths:
            original = self.checkout / path
            values |= {value for file in (original, *_files_for_secrets(original)) for value in _secrets_in(file)}
        return frozenset(values)


def _folders(path: str) -> list[str]:
    """Return the folders above a path, from the root down."""
    return [str(folder) for folder in reversed(PurePosixPath(path).parents)][1:]


def _check_path(top: Path, path: str, hidden: Sequence[Path]) -> tuple[str, str] | None:
    """Return the problem with a path in the checkout and a remedy, or None. Blocks."""
    link = next((folder for folder in _folders(path) if (top / folder).is_symlink()), None)
    if link is not None:
        return f"{path!r} goes through the link {link!r}", f"name {link!r} itself, or replace it with a folder"
    target = top / path
    if not os.path.lexists(target):
        return f"{path!r} does not exist in {top}", "create it, or remove it from the configuration"
    real = Path(os.path.realpath(target))
    if not real.is_file() and not real.is_dir():
        return f"{path!r} is neither a file nor a folder", "remove it"
    if any(real.is_relative_to(path) or path.is_relative_to(real) for path in hidden):
        return f"{path!r} contains files hidden from sessions: {real}", "list only the files that sessions need"
    if not os.access(real, os.R_OK):
        return f"{path!r} can't be read", "make it readable, or remove it from the configuration"
    return None


async def _clear(tree: Path, path: str, git: Git) -> Path:
    """Clear a path in a worktree and make its parents real folders; return it."""
    if await anyio.to_thread.run_sync(_make_parents, tree, path):
        await remove_all([tree / path], git.environ, git.keep_fds)
    return tree / path


def _make_parents(tree: Path, path: str) -> bool:
    """Create the folders above a path; return whether a folder exists at the path."""
    for parent in _folders(path):
        if not _is_folder(tree / parent):
            (tree / parent).mkdir()
    return _is_folder(tree / path)


def _is_folder(target: Path) -> bool:
    """Return whether a path is a folder; remove anything else, including a link."""
    if is_folder(target):
        return True
    target.unlink(missing_ok=True)
    return False


#: A linked folder may be as large as a disk.
_MAX_FOLDERS = 10_000


def _files_for_secrets(folder: Path) -> Iterator[Path]:
    for top, _, names in islice(os.walk(folder), _MAX_FOLDERS):
        yield from (Path(top, name) for name in names if is_secret_file(name) or name.endswith(_ENV_FILES))


def _secrets_in(file: Path) -> frozenset[str]:
    with suppress(OSError):
        if file.is_file() and file.stat().st_size <= _MAX_ENV_FILE_BYTES:
            return _secret_values(parse_env_values(file.read_text(encoding="utf-8", errors="surrogateescape")))
    return frozenset()


def _secret_values(pairs: Iterable[tuple[str, str]]) -> frozenset[str]:
    return frozenset(value for name, value in pairs for value in secret_values({name: value}))


def parse_env_values(text: str) -> Iterator[tuple[str, str]]:
    """Yield names with all possible values, because programs use different rules.

    Quoted values, which may span lines, are yielded with and without resolved escapes; other values up to the end of
    the line, and up to a comment.
    """
    for match in _QUOTED.finditer(text):
        name, double, single = match.groups()
        yield name, single if double is None else double
        if double is not None:
            yield name, _ESCAPE.sub(lambda escape: _ESCAPED.get(escape[1], escape[1]), double)
    for match in _PLAIN.finditer(text):
        name, value = match.groups()
        if not value.startswith(('"', "'")):
            yield name, value.strip()
            yield name, re.split(r"\s#", value)[0].strip()
