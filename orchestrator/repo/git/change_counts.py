"""Count changed files and lines; imports little, for `council status`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.repo.git.command import Git, is_object_id
from orchestrator.repo.git.reading import diff_trees

# Run no configured program, and make the output independent of settings.
PLAIN = ("--no-ext-diff", "--no-textconv", "--find-renames", "--submodule=short")
COUNTS = (*PLAIN, "--numstat")


@dataclass(frozen=True, slots=True)
class Changes:
    """A number of files, added lines and removed lines (none for binary files)."""

    files: int = 0
    added: int = 0
    removed: int = 0

    def __add__(self, other: Changes) -> Changes:
        """Return the sum of two counts."""
        return Changes(self.files + other.files, self.added + other.added, self.removed + other.removed)

    def __sub__(self, other: Changes) -> Changes:
        """Return this count minus an earlier one."""
        return Changes(self.files - other.files, self.added - other.added, self.removed - other.removed)


async def count(git: Git, base: str, commit: str) -> Changes:
    """Count the changes between two commits."""
    return parse_numstat((await diff_trees(git, base, commit, COUNTS)).splitlines())


async def count_many(git: Git, commits: Mapping[str, str | None]) -> dict[str, Changes]:
    """Count the changes in several commits with one git command.

    Each commit is compared with the commit it is mapped to, or with its first parent if that is None.
    """
    if not commits:
        return {}
    command = ("diff-tree", "--stdin", "-r", "--root", "--diff-merges=first-parent", *COUNTS)
    pairs = "".join(f"{commit} {base}\n" if base else f"{commit}\n" for commit, base in commits.items())
    done = await git(*command, input_=pairs.encode())
    lines: dict[str, list[bytes]] = {commit: [] for commit in commits}
    commit = ""
    for line in done.stdout.splitlines():
        if is_object_id(name := line.decode(errors="replace")):
            commit = name
        else:
            lines[commit].append(line)
    return {commit: parse_numstat(changed) for commit, changed in lines.items()}


def parse_numstat(lines: Iterable[bytes]) -> Changes:
    """Sum up the lines of `git diff --numstat`."""
    rows = [line.split(b"\t", 2) for line in lines if line]
    counts = [(int(added), int(removed)) for added, removed, _ in rows if added != b"-"]
    return Changes(len(rows), sum(added for added, _ in counts), sum(removed for _, removed in counts))
