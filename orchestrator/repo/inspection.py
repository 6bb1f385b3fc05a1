"""What may come in from an agent: no secret and no huge file, judged by name, by size and by content."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import anyio.to_thread

from orchestrator.domain.secrets import Redactor, is_secret_file, secret_values
from orchestrator.errors import GitError
from orchestrator.repo.git import GITLINK, Change, Git

LARGEST_FILE = 50 << 20  # bytes: what the large hosts take without a warning
_WITHOUT_CONTENT = frozenset({GITLINK, "040000"})  # what has a name and nothing to read: others, and folders
_AT_ONCE = 32 << 20  # bytes of content that are read at a time


@dataclass(frozen=True, slots=True)
class Admission:
    """The rules: the largest file in bytes, and the values that no file may have.

    `leavings` are patterns, as in a .gitignore, of files that are no work where the base does not have them.
    """

    redactor: Redactor
    max_file: int = LARGEST_FILE
    leavings: tuple[str, ...] = ()

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Admission:
        """Return the rules that keep the secrets of this environment out."""
        return cls(Redactor(secret_values(environ)))

    def of_file(self, path: str, size: int) -> str | None:
        """Return why a file of this name and size (bytes) may not come in, None if it may."""
        if is_secret_file(path):
            return "its name is that of a file for secrets"
        if why := self.of_name(path):
            return why
        if size > self.max_file:
            return f"it has {size} bytes, more than {self.max_file}"
        return None

    def of_name(self, path: str) -> str | None:
        """Return why nothing of this name may come in, a folder neither; None if it may."""
        return "its name holds a secret" if self.redactor.finds(os.fsencode(path)) else None


async def inspect(git: Git, changes: Iterable[Change], admit: Admission, env: Mapping[str, str]) -> dict[str, str]:
    """Return the paths of those changes that may not come in, each with the reason.

    `old_id` of a change is what the base has at the path: a secret that is there already is nothing new. Git runs
    with `env`, which says where the objects are. No more than some 32 MiB or one file are in memory at once.
    """
    there = [one for one in changes if one.new_id != one.old_id and int(one.new_mode, 8)]
    named = {one.path: why for one in there if (why := admit.of_name(one.path))}
    news = [one for one in there if one.new_mode not in _WITHOUT_CONTENT]
    sizes = await _sizes(git, {one.new_id for one in news}, env)
    refused = named | {one.path: why for one in news if (why := admit.of_file(one.path, sizes[one.new_id]))}
    left = [one for one in news if one.path not in refused]
    found: dict[str, set[bytes]] = {}
    for batch in _batches(sorted({one.new_id for one in left}), sizes):
        found |= await _find(git, batch, admit.redactor, env)
    for one in left:
        if found.get(one.new_id) and found[one.new_id] - await _known(git, one.old_id, admit.redactor, env):
            refused[one.path] = "it holds a secret"
    return refused


async def _sizes(git: Git, ids: Iterable[str], env: Mapping[str, str]) -> dict[str, int]:
    listed = "".join(f"{name}\n" for name in ids).encode()
    done = await git("cat-file", "--batch-check=%(objectname) %(objectsize)", env=env, input_=listed)
    pairs = [line.split() for line in done.stdout.decode().splitlines()]
    missing = [name for name, size in pairs if not size.isdigit()]
    if missing:
        raise GitError(["cat-file"], 0, f"{missing[0]} is missing")
    return {name: int(size) for name, size in pairs}


def _batches(ids: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    total = 0
    for name in ids:
        if batch and total + sizes[name] > _AT_ONCE:
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += sizes[name]
    if batch:
        yield batch


async def _find(git: Git, ids: Sequence[str], redactor: Redactor, env: Mapping[str, str]) -> dict[str, set[bytes]]:
    done = await git("cat-file", "--batch", env=env, input_="".join(f"{name}\n" for name in ids).encode())
    return await anyio.to_thread.run_sync(_scan, done.stdout, redactor)


def _scan(output: bytes, redactor: Redactor) -> dict[str, set[bytes]]:
    """Read what `git cat-file --batch` printed: for each object a line with its size, then its content."""
    found = {}
    at = 0
    while at < len(output):
        end = output.index(b"\n", at)
        name, _, size = output[at:end].split()
        content = output[end + 1 : end + 1 + int(size)]
        if secrets := redactor.finds(content):
            found[name.decode()] = secrets
        at = end + 1 + int(size) + 1
    return found


async def _known(git: Git, base_id: str, redactor: Redactor, env: Mapping[str, str]) -> set[bytes]:
    if not base_id.strip("0"):
        return set()
    return (await _find(git, [base_id], redactor, env)).get(base_id, set())
