"""Select the commit that an attempt starts from.

It is the newest commit of the base or the target, with earlier work merged onto it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, NamedTuple

import anyio

from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.scheduling.stacked_work import select_stack
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.settings.path_patterns import find_out_of_scope
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.engine.phases.start import ConflictingWork, NextPhase
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError, WorkMissing
from orchestrator.repo.git.command import GITLINK_MODE
from orchestrator.repo.git.unsupported_files import can_be_checked_out
from orchestrator.repo.landing.merge_commits import rebase_work, renew_retry_base, stack_work
from orchestrator.repo.source.compatibility import check_supported

#: Outcomes of attempts that conflicted with the target at that time.
_STALE: Final = frozenset({FailureClass.CONFLICT, FailureClass.CHECKS_FAILED})


class StackedBase(NamedTuple):
    """The commit that new work starts from, and the tasks whose unlanded work it includes, each with its commit."""

    base: str
    stacked_on: Mapping[str, str]


class BaseSelector:
    """Selects the start points of the attempts of one run."""

    def __init__(self, ledger: Ledger, context: RunContext) -> None:
        self._ledger, self._context = ledger, context
        self._base: str | None = None
        self._supported = ledger.run.start
        self._fetch_lock = anyio.Lock()
        self._stacks: dict[tuple[str, ...], str] = {}
        """Bases by the commit of the target and the works that they add."""

    async def select(self, task: str, spec: TaskSpec, next_phase: NextPhase, tips: dict[bool, str]) -> NextPhase | None:
        """Return the next phase of a task with the commits that its session starts from.

        None if it can't start on the work of the tasks that it needs before these have landed. `tips` caches commits
        for tasks that start together. Earlier work continues if it merges cleanly onto the current target. Otherwise,
        work to be fixed starts from scratch, with the earlier work in the prompt, while a later phase starts from the
        unmerged work, and its landing reports the conflict. Raises RefusedError if the newest commit is not supported.
        """
        document = self._ledger.task(task)
        builds_on_target = self.builds_on_target(task, spec) or next_phase.start is not None
        if builds_on_target not in tips:
            tips[builds_on_target] = await self.newest(builds_on_target=builds_on_target)
        tip = tips[builds_on_target]
        await self._check_supported(tip)
        stacked = await self.stack(task, spec.built_needs, tip)
        if stacked is None:
            return None
        tip, next_phase = stacked.base, replace(next_phase, stacked_on=stacked.stacked_on)
        if next_phase.start is None:
            return replace(next_phase, base=tip)
        branches = (each.branch for each in reversed(document.attempts) if not each.restart_reason)
        conflicting = ConflictingWork(next(filter(None, branches), None), next_phase.start, None)
        with suppress(GitError):  # its parents are not here, or the target was rewritten
            merged = await self._renew(task, document, next_phase.base, next_phase.start, tip)
            if isinstance(merged, str):
                return replace(next_phase, base=tip, start=merged)
            conflicting = replace(conflicting, base=next_phase.base, paths=merged)
        if document.start is None and next_phase.base is not None:
            return replace(next_phase, is_newest=False, stacked_on=document.stack_of(next_phase.base))
        return replace(next_phase, base=tip, start=None, conflicting=conflicting)

    async def _renew(
        self, task: str, document: TaskDocument, base: str | None, work: str, tip: str
    ) -> str | tuple[str, ...]:
        """Return earlier work on the newest commit, or the conflicting paths."""
        ref = self._context.refs(f"renew_retry_base/{task}")
        if base is None or base == tip or not document.stack_of(base):
            return await renew_retry_base(self._context.git, work, tip, ref)
        rebased = await rebase_work(self._context.git, base, work, tip, ref)
        return rebased if isinstance(rebased, str) else rebased.paths

    async def stack(self, task: str, needs: Sequence[str], tip: str) -> StackedBase | None:
        """Return `tip` with the built, unlanded work of the tasks that a task needs.

        None if this is impossible until they have landed: they conflict, or their work is only on another machine.
        """
        works = select_stack(needs, self._ledger.tasks.documents())
        if not works:
            return StackedBase(tip, {})
        ref, known = self._context.refs(f"stack/{task}"), self._stacks.get((tip, *works.values()))
        if known is not None:  # equal bases have equal commits, so that later phases need no rebase
            await self._context.git("update-ref", ref, known)
            return StackedBase(known, works)
        try:
            for need, commit in works.items():
                await self._ledger.fetch_work(need, commit, self._context.refs(f"need/{need}"))
            base = await stack_work(self._context.git, tip, works, ref)
        except (GitError, WorkMissing):
            return None
        if not isinstance(base, str):
            return None
        self._stacks[tip, *works.values()] = base
        return StackedBase(base, works)

    async def _check_supported(self, tip: str) -> None:
        """Raise RefusedError if unsupported files were committed since the start of the run.

        A session's files in a submodule could not be collected, git LFS files would land as plain files, and no session
        could start from a file whose name is too long.
        """
        if tip == self._supported:
            return
        # Listing all files for each landing would take too long in large repositories.
        changes = await self._context.git.changes(self._supported, tip)
        if any(
            each.new_mode == GITLINK_MODE
            or each.path.endswith(".gitattributes")
            or not can_be_checked_out(os.fsencode(each.path))
            for each in changes
        ):
            await check_supported(self._context.git, tip)
        self._supported = tip

    def builds_on_target(self, task: str, spec: TaskSpec) -> bool:
        """Return True if a task without earlier work starts from the target, not the base."""
        document = self._ledger.task(task)
        was_stale = any(attempt.outcome in _STALE for attempt in document.attempts)
        return spec.builds_on_target or was_stale or bool(document.subtasks)

    async def is_outdated(self, owns: Sequence[str], base: str) -> bool:
        """Return True if owned paths changed on the target since `base`.

        Call this while no other task can own these paths.
        """
        try:
            tip = await self.newest(builds_on_target=True)
        except GitError:  # the landing reports it
            return False
        if tip == base or await self._context.git.is_ancestor(tip, base):  # with unlanded work of other tasks
            return False
        changed = [change.path for change in await self._context.git.changes(base, tip)]
        return len(find_out_of_scope(owns, changed)) < len(changed)

    async def newest(self, *, builds_on_target: bool) -> str:
        """Return the newest commit of the base or the target, for new work."""
        try:
            async with self._fetch_lock:  # concurrent fetches of the same ref would both fail
                return await self._fetch_newest(builds_on_target)
        except GitError:
            # The remote may be temporarily unreachable: use the last known commit.
            known = self._context.target.known if builds_on_target else self._base
            if known is None:
                raise
            return known

    async def _fetch_newest(self, builds_on_target: bool) -> str:
        if builds_on_target:
            return await self._context.target.tip()
        tip = await self._context.source.tip(self._ledger.run.base)
        if tip is not None and tip != self._base:
            self._base = await self._context.source.fetch(self._ledger.run.base, self._context.refs("base"))
        return self._base or self._ledger.run.start
