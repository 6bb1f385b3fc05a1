"""How much commits change: files and lines. Imports little, because `council status` counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.repo.git.command import Git, is_object_id

# No program that a configuration names may run, and what is shown depends on nobody's settings.
PLAIN = ("--no-ext-diff", "--no-textconv", "--find-renames", "--submodule=short")
COUNTS = (*PLAIN, "--numstat")


@dataclass(frozen=True, slots=True)
class Changes:
    """How much work changes: files, and the lines that it adds and removes; what is no text has no lines."""

    files: int = 0
    added: int = 0
    removed: int = 0

    def __add__(self, other: Changes) -> Changes:
        """Return both together."""
        return Changes(self.files + other.files, self.added + other.added, self.removed + other.removed)

    def __sub__(self, other: Changes) -> Changes:
        """Return this without what was counted in it before."""
        return Changes(self.files - other.files, self.added - other.added, self.removed - other.removed)


async def count(git: Git, base: str, commit: str) -> Changes:
    """Return how much differs between two commits."""
    return counted((await git("diff-tree", "-r", *COUNTS, base, commit)).stdout.splitlines())


async def count_many(git: Git, commits: Mapping[str, str | None]) -> dict[str, Changes]:
    """Return how much each of many commits changes, with one git command for all.

    Each is compared with the commit that it is mapped to; None: with its first parent.
    """
    if not commits:
        return {}
    command = ("diff-tree", "--stdin", "-r", "--root", "--diff-merges=first-parent", *COUNTS)
    lines_in = "".join(f"{one} {base}\n" if base else f"{one}\n" for one, base in commits.items())
    done = await git(*command, input_=lines_in.encode())
    lines: dict[str, list[bytes]] = {commit: [] for commit in commits}
    commit = ""
    for line in done.stdout.splitlines():
        if is_object_id(name := line.decode(errors="replace")):
            commit = name
        else:
            lines[commit].append(line)
    return {commit: counted(of_it) for commit, of_it in lines.items()}


def counted(lines: Iterable[bytes]) -> Changes:
    """Return what lines of `git diff --numstat` come to."""
    found = [line.split(b"\t", 2) for line in lines if line]
    counts = [(int(added), int(removed)) for added, removed, _ in found if added != b"-"]
    return Changes(len(found), sum(added for added, _ in counts), sum(removed for _, removed in counts))
