"""Move the built work of a run between machines, through its remote.

Each commit has a ref of its own, `refs/council/<run>/<task>/<commit>`: machines never write the same ref, and a commit
that somebody has replaced at the remote is not accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.errors import WorkMissing
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.upstream import UpstreamRepository

_NAMESPACE = "refs/council"
#: The number of refs per command: its arguments have a limited size.
_MAX_REFS = 500


class TaskCommit(NamedTuple):
    """A commit with work of a task."""

    task: str
    commit: str


@dataclass(frozen=True, slots=True)
class SharedWork:
    """The work of a run that is at its remote; `git` runs in the trusted repository."""

    source: UpstreamRepository
    git: Git
    run: str

    async def push(self, works: Collection[TaskCommit]) -> None:
        """Push commits to the remote. Raises GitError if it can't be reached or refuses them."""
        await self._push([f"{work.commit}:{self._ref(work)}" for work in works])

    async def fetch(self, work: TaskCommit, ref: str) -> None:
        """Fetch a commit, and store it as `ref` in the trusted repository, unless it is here.

        Raises GitError if the remote can't be reached, and WorkMissing if it does not have the commit.
        """
        if await self.has(work.commit):
            return
        if work not in await self.list():
            message = f"the work of task {work.task!r} (commit {work.commit:.10}) is neither here nor at the remote"
            raise WorkMissing(message, "start `council work` on the machine that built it, which pushes it")
        await self.source.fetch_ref(self._ref(work), ref)
        if not await self.has(work.commit):
            message = f"{self._ref(work)} at the remote is not the work of task {work.task!r}"
            raise WorkMissing(message, "find out who has changed it, then delete it at the remote, and retry the task")

    async def has(self, commit: str) -> bool:
        """Return whether a commit is on this machine."""
        return (await self.git("cat-file", "-e", f"{commit}^{{commit}}", ok=(0, 1, 128))).returncode == 0

    async def list(self) -> frozenset[TaskCommit]:
        """Return the commits at the remote. Raises GitError if it can't be reached."""
        prefix = f"{_NAMESPACE}/{self.run}/"
        refs = [ref.removeprefix(prefix) for ref in await self.source.refs(f"{prefix}*")]
        return frozenset(TaskCommit(*ref.split("/")) for ref in refs if ref.count("/") == 1)

    async def delete(self, is_unneeded: Callable[[str], bool]) -> None:
        """Delete the work of unneeded tasks from the remote. Raises GitError if it can't be reached."""
        await self._push([f":{self._ref(work)}" for work in await self.list() if is_unneeded(work.task)])

    async def _push(self, refspecs: Iterable[str]) -> None:
        remaining = list(refspecs)
        while remaining:
            await self.source.push_refs(remaining[:_MAX_REFS])
            del remaining[:_MAX_REFS]

    def _ref(self, work: TaskCommit) -> str:
        return f"{_NAMESPACE}/{self.run}/{work.task}/{work.commit}"
