"""Collect a session's work: commit the changes in its worktree, or discard them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import anyio
from tenacity import AsyncRetrying, retry_if_exception, wait_exponential

from orchestrator.errors import GitError, is_resource_exhaustion
from orchestrator.repo.git.command import Git, printable_name
from orchestrator.repo.intake.collect import CollectionResult, collect_work
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.worktrees import worktrees
from orchestrator.repo.worktrees.checkouts import HeldSlot
from orchestrator.repo.worktrees.files.change_detection import TreeDiff
from orchestrator.repo.worktrees.worktrees import Worktree
from orchestrator.sessions.assignment import Assignment, SessionResources

#: Caches of test runners and linters, as .gitignore patterns. A read-only session may write them.
_CACHES = (
    *("__pycache__/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/", ".tox/", ".nox/"),
    *(".coverage", ".nyc_output/", ".eslintcache", ".gradle/"),
)
#: Maximum seconds between attempts to collect work while the machine lacks a resource such as disk space.
_MAX_RETRY_WAIT = 10.0


@dataclass(frozen=True, slots=True)
class WorkCollector:
    """Collects the work of one session."""

    tools: SessionResources
    assignment: Assignment
    checkout: HeldSlot
    scratch_patterns: Sequence[str]
    """The adapter's temporary files, which are never committed."""
    stopping: anyio.Event
    """Set to end retries."""

    async def collect(self) -> tuple[CollectionResult, TreeDiff | None]:
        """Collect the session's work, and return it with the changes in its worktree.

        Retries while the machine lacks a resource. Raises GitError or OSError if the work can't be collected, or if
        the session is stopped during a retry wait.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception(
                lambda error: isinstance(error, GitError | OSError) and is_resource_exhaustion(error)
            ),
            wait=wait_exponential(max=_MAX_RETRY_WAIT),
            stop=lambda _: self.stopping.is_set(),
            sleep=self._wait,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                diff = await self.checkout.compare()
                work = await self._commit(diff)
                return work if self.assignment.writes else await self._discard(work), diff
        raise AssertionError("an attempt returns or raises")

    async def _wait(self, seconds: float) -> None:
        clock = self.tools.clock
        await clock.wait(self.stopping, clock.monotonic() + seconds)

    @property
    def rules(self) -> IntakeRules:
        """The rules for its files."""
        assignment, unignored = self.assignment, self.checkout.contents.record.unignored
        scratch = (*self.scratch_patterns, *(() if assignment.writes else _CACHES))
        return replace(self.tools.intake_rules(assignment.max_file, unignored), scratch_patterns=scratch)

    async def _commit(self, diff: TreeDiff | None) -> CollectionResult:
        assignment = self.assignment
        message = self.tools.redactor.text(format_commit_message(assignment.worktree, assignment.task_prompt))
        base = assignment.base if assignment.writes else assignment.start or assignment.base
        git, worktree = self.tools.git, assignment.worktree
        return await collect_work(git, worktree, base, message, rules=self.rules, diff=diff)

    async def _discard(self, work: CollectionResult) -> CollectionResult:
        """Discard the changes of a session without write permission."""
        if work.commit is None:
            return replace(work, complete=True, discarded=work.left_out)
        assignment, git = self.assignment, self.tools.git
        changes = await git.changes(assignment.start or assignment.base, work.commit)
        await git("update-ref", "-d", f"refs/heads/{assignment.worktree.branch}")
        paths = dict.fromkeys((*(printable_name(change.path) for change in changes), *work.left_out))
        return replace(work, commit=None, complete=True, discarded=tuple(paths))


async def salvage_session(git: Git, worktree: Worktree, base: str, prompt: str, rules: IntakeRules) -> CollectionResult:
    """Collect the work of an interrupted session.

    No process of the session and none of our git commands on its worktree may be alive.
    """
    if not worktrees.unlock_index(worktree):
        return CollectionResult(None)  # the checkout is incomplete, so no CLI has run in it
    message = rules.redactor.text(format_commit_message(worktree, prompt))
    return await collect_work(git, worktree, base, message, rules=rules)


def format_commit_message(worktree: Worktree, prompt: str) -> str:
    """Return an attempt's commit message."""
    return f"{format_work_subject(worktree.task, prompt)}\n\nCouncil-Attempt: {worktree.attempt}\n"


def format_work_subject(task: str, prompt: str) -> str:
    """Return the first line of an attempt's commit message: the task and the prompt's first line."""
    first = next((line.strip() for line in prompt.splitlines() if line.strip()), "")
    subject = "".join(char for char in f"{task}: {first}" if char.isprintable())
    return subject if len(subject) <= 72 else subject[:71] + "…"
