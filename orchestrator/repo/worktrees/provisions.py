"""What git does not track and programs need all the same, from the user's checkout into each worktree.

Copies are made anew each time, so that no session finds what another one made of them; links lead to the user's own
files, which the sandbox lets sessions read. Nobody writes to the worktree meanwhile, but whoever did before may have
put anything where something is to be: it is removed, never followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final

import anyio.to_thread

from orchestrator.config.model import PathAccess
from orchestrator.domain.security.envfile import parse_env_values
from orchestrator.domain.security.secrets import is_secret_file, secret_values
from orchestrator.errors import GitError, is_resource_exhaustion
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.copying import copy_tree
from orchestrator.repo.worktrees.removal import remove_all

_LONGEST_ENV_FILE: Final = 1 << 20  # bytes
_ENV_FILES: Final = (".env", ".envrc")


@dataclass(frozen=True, slots=True)
class ProvisionFailure:
    """Something that a worktree was to have can't be put there: what is wrong with it, and what to do.

    `exhausted` means a lack of memory, disk, processes or descriptors, which may pass.
    """

    what: str
    remedy: str
    exhausted: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


@dataclass(frozen=True, slots=True)
class Provisions:
    """Paths of the user's `checkout` that each worktree gets a copy of, or a link to, as the config has them.

    Nothing is taken that is one of the `hidden` files and folders, is in one, or holds one.
    """

    checkout: Path
    copied: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()
    hidden: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them: what `IntakeRules` is to withhold."""
        return self.copied + self.linked

    async def faults(self, commit: str, git: Git, named: str = "the commit") -> list[ProvisionFailure]:
        """Return why some of it can't be put into a checkout of `commit`, which messages call `named`.

        It must be in the user's checkout, and not in the commit. Its last part may be a link: then it is what that
        leads to, wherever it is. Folders before it may be no links: what they are is decided by what landed, too.
        """
        if not self.paths:
            return []
        return [*await self._committed(commit, git, named), *await anyio.to_thread.run_sync(self._look_at_all)]

    async def install_into(self, tree: Path, commit: str, git: Git) -> PathAccess | ProvisionFailure:
        """Put everything into `tree`, a checkout of `commit`; return what programs there must be able to read.

        `git` runs in the trusted repository. What is there already is replaced. Modes are kept, and so are links
        inside of copied folders.
        """
        if faults := await self.faults(commit, git):
            return faults[0]
        readable: list[Path] = []
        for path in self.paths:
            original = await anyio.to_thread.run_sync(os.path.realpath, self.checkout / path)
            try:
                place = await _clear(tree, path, git)
                if path in self.copied:
                    await copy_tree(original, place, git.environ, git.keep_fds, times=True)
                else:
                    await anyio.to_thread.run_sync(place.symlink_to, original)
                    readable.append(Path(original))
            except (OSError, GitError) as error:
                what, remedy = f"{path!r} can't be put into a worktree: {error}", f"see to {self.checkout / path}"
                return ProvisionFailure(what, remedy, is_resource_exhaustion(error))
        return PathAccess(readable=tuple(readable))

    async def secrets(self) -> frozenset[str]:
        """Return the values in these files that are to be hidden wherever text is stored.

        Those of lines NAME=value with a secret's name, in each file that is named in the config, and in their folders
        in files that are called as files for secrets are. What can't be read has none.
        """
        return await anyio.to_thread.run_sync(self._read_secrets)

    def _key(self, path: str) -> str:
        return f"`worktrees.{'copy' if path in self.copied else 'link'}`"

    async def _committed(self, commit: str, git: Git, named: str) -> list[ProvisionFailure]:
        """Return what is wrong where the commit has something of its own at, or above, a path."""
        asked = {*self.paths, *(folder for path in self.paths for folder in _folders(path))}
        kinds = {path: meta.split(" ")[1] for path, meta in (await git.entries(commit, asked)).items()}
        return [fault for path in self.paths for fault in self._judge(path, kinds, named)]

    def _judge(self, path: str, kinds: Mapping[str, str], named: str) -> Iterator[ProvisionFailure]:
        key = self._key(path)
        if path in kinds:
            yield ProvisionFailure(f"{path!r} is in {named} already", f"remove it from {key}: sessions see it anyway")
        for folder in _folders(path):
            if kinds.get(folder, "tree") != "tree":
                yield ProvisionFailure(f"{folder!r} is no folder in {named}", f"remove {path!r} from {key}")

    def _look_at_all(self) -> list[ProvisionFailure]:
        hidden = [Path(os.path.realpath(one)) for one in self.hidden]
        found = ((self._key(path), _check_path(self.checkout, path, hidden)) for path in self.paths)
        return [ProvisionFailure(f"{key}: {fault[0]}", fault[1]) for key, fault in found if fault is not None]

    def _read_secrets(self) -> frozenset[str]:
        found: set[str] = set()
        for path in self.paths:
            original = self.checkout / path
            found |= {value for file in (original, *_files_for_secrets(original)) for value in _secrets_in(file)}
        return frozenset(found)


def _folders(path: str) -> list[str]:
    """Return the folders that a path leads through, from the top."""
    return [str(folder) for folder in reversed(PurePosixPath(path).parents)][1:]


def _check_path(top: Path, path: str, hidden: Sequence[Path]) -> tuple[str, str] | None:
    """Return what is wrong with a path of the checkout, and what to do; None if nothing is. Blocks."""
    link = next((folder for folder in _folders(path) if (top / folder).is_symlink()), None)
    if link is not None:
        return f"{path!r} goes through the link {link!r}", f"name {link!r} itself, or make it a folder"
    place = top / path
    if not os.path.lexists(place):
        return f"there is no {path!r} in {top}", "make it there, or remove it"
    real = Path(os.path.realpath(place))
    if not real.is_file() and not real.is_dir():
        return f"{path!r} is neither a file nor a folder", "remove it"
    if any(real.is_relative_to(one) or one.is_relative_to(real) for one in hidden):
        return f"{path!r} is, or holds, what no session may see: {real}", "name only the files that sessions need"
    if not os.access(real, os.R_OK):
        return f"{path!r} can't be read", "let yourself read it, or remove it"
    return None


async def _clear(tree: Path, path: str, git: Git) -> Path:
    """Return where something goes in a worktree: nothing is there, and all above are folders in it."""
    if await anyio.to_thread.run_sync(_make_parents, tree, path):
        await remove_all([tree / path], git.environ, git.keep_fds)
    return tree / path


def _make_parents(tree: Path, path: str) -> bool:
    """Make the folders that a path leads through; return whether a folder is where it is to be."""
    for parent in _folders(path):
        if not _is_folder(tree / parent):
            (tree / parent).mkdir()
    return _is_folder(tree / path)


def _is_folder(place: Path) -> bool:
    """Whether a folder is there; anything else, a link to a folder too, is removed."""
    if place.is_dir() and not place.is_symlink():
        return True
    place.unlink(missing_ok=True)
    return False


#: A folder that is linked may be as large as a disk.
_MOST_FOLDERS = 10_000


def _files_for_secrets(folder: Path) -> Iterator[Path]:
    for top, _, names in islice(os.walk(folder), _MOST_FOLDERS):
        yield from (Path(top, name) for name in names if is_secret_file(name) or name.endswith(_ENV_FILES))


def _secrets_in(file: Path) -> frozenset[str]:
    with suppress(OSError):
        if file.is_file() and file.stat().st_size <= _LONGEST_ENV_FILE:
            return _secret_values(parse_env_values(file.read_text(encoding="utf-8", errors="surrogateescape")))
    return frozenset()


def _secret_values(pairs: Iterable[tuple[str, str]]) -> frozenset[str]:
    return frozenset(value for name, value in pairs for value in secret_values({name: value}))
