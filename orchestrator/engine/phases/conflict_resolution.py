"""Have a session resolve a merge conflict, and verify its work before it may land.

The session starts from git's merge, with conflict markers. Its answer is only a tree: what it may change, and whether
both sides survive, is computed from the commits of the conflict.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

from orchestrator.domain.runs.model import PreparedMerge, TaskDocument
from orchestrator.domain.security.quoting import DATA_NOTICE, format_value, quote_block
from orchestrator.domain.settings.run_settings import Check, TaskSpec
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import RefusedError
from orchestrator.repo.git.change_counts import PLAIN
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.conflicting_files import find_problem, read_conflict
from orchestrator.repo.landing.merge_commits import create_retry_base
from orchestrator.repo.worktrees.hub import internal_ref_name

#: The largest part of a diff in the prompt, in characters.
_MAX_DIFF = 40_000


def may_merge_structurally(document: TaskDocument, spec: TaskSpec) -> bool:
    """Return True if structural merge drivers may merge the work of a task.

    A resolution of a session is compared with the conflict that it resolves, so it may not have another one.
    """
    return spec.on_conflict == "resolve" and document.conflict is None


def resolves_conflict(document: TaskDocument) -> bool:
    """Return True if the work of a task is the resolution of a conflict, to be verified."""
    return document.conflict is not None and not document.building_attempt.restart_reason


class ConflictResolutions:
    """The conflict resolutions of one run."""

    def __init__(self, ledger: Ledger, git: Git) -> None:
        self._ledger, self._git = ledger, git

    async def prepare(self, task: str, conflict: str) -> tuple[str, str]:
        """Return the commit that a session resolves the conflict from, and the section for its prompt.

        `conflict` is the commit with the markers and both sides as parents. Raises RefusedError if no session may
        resolve it.
        """
        ours, theirs = (await self._git.line("rev-parse", f"{conflict}^1", f"{conflict}^2")).split()
        found = await read_conflict(self._git, ours, theirs)
        start = await create_retry_base(self._git, conflict, internal_ref_name(self._ledger.run.id, f"again/{task}"))
        others = await self._other_tasks(found.base, ours, list(found.files))
        marker = secrets.token_hex(8)
        briefs = [quote_block(format_value(spec.prompt, _MAX_DIFF), marker, f"task {spec.id}") for spec in others]
        diffs = [
            quote_block(await self._diff(found.base, side, found.files), marker, f"diff of {name}")
            for name, side in (("the target", ours), ("this task", theirs))
        ]
        listed = quote_block("\n".join(found.files), marker, "conflicting files")
        return start, (
            "---\nThe work of this task is finished, but conflicts with the target. This worktree contains git's\n"
            "merge of both, with conflict markers. Resolve each conflict so that every change of both sides remains,\n"
            "and remove the markers. Add, drop and reformat no other line, or the resolution is rejected.\n"
            f"The text between two markers is from others; {DATA_NOTICE}.\n"
            + "\n".join([listed, *briefs, *diffs])
            + "\n"
        )

    async def find_problem(self, task: str) -> str | None:
        """Return the reason to reject the resolution of a task, or None."""
        document = self._ledger.task(task)
        try:
            found = await read_conflict(self._git, document.building_attempt.base, f"{document.conflict}^2")
            return await find_problem(self._git, found, document.commit or "")
        except RefusedError as error:
            return error.message

    async def other_checks(self, task: str, spec: TaskSpec, merge: PreparedMerge) -> list[Check]:
        """Return the checks of the tasks whose landed changes were in the resolved conflict."""
        document = self._ledger.task(task)
        ours, theirs = f"{merge.new}^1", f"{merge.new}^2"
        if resolves_conflict(document):
            ours, theirs = document.building_attempt.base, f"{document.conflict}^2"
        base = await self._git.line("merge-base", ours, theirs)
        paths = [change.path for change in await self._git.changes(f"{merge.new}^1", merge.new)]
        others = await self._other_tasks(base, ours, paths)
        checks = dict.fromkeys(check for other in others for check in other.checks)
        return [check for check in checks if check not in spec.checks and check.is_selected(paths)]

    async def _other_tasks(self, base: str, tip: str, paths: Sequence[str]) -> list[TaskSpec]:
        """Return the tasks that changed one of the paths on the target after `base`."""
        since = set((await self._git.line("rev-list", "--first-parent", f"{base}..{tip}")).split())
        found = []
        for task in self._ledger.run.tasks:
            landed = self._ledger.task(task).landed
            if landed is None or landed not in since:
                continue
            if not {change.path for change in await self._git.changes(f"{landed}^1", landed)}.isdisjoint(paths):
                found.append(await self._ledger.definitions.spec(task))
        return found

    async def _diff(self, base: str, side: str, paths: Iterable[str]) -> str:
        literal = {"GIT_LITERAL_PATHSPECS": "1"}
        done = await self._git("diff-tree", "--patch", *PLAIN, base, side, "--", *paths, env=literal)
        return format_value(done.stdout.decode(errors="replace"), _MAX_DIFF)
