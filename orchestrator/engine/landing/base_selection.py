"""Where attempts start: at the newest state of what they build on, with the earlier work that they are to mend."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import anyio

from orchestrator.config.model import TaskSpec
from orchestrator.domain.runs.failures import FailureClass
from orchestrator.domain.scheduling.path_patterns import find_out_of_scope
from orchestrator.engine.phases.start import NextPhase
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import GitError

#: What a task has that did not fit onto the target as the target is now.
_STALE: Final = frozenset({FailureClass.CONFLICT, FailureClass.CHECKS_FAILED})


class StartPoint(NamedTuple):
    """Where an attempt starts."""

    base: str
    """The commit that its work is judged against."""
    commit: str | None = None
    """What its worktree begins at where that is not the base: earlier work, merged onto it."""
    is_newest: bool = True
    """Whether the base is the newest state of what it builds on."""


class BaseSelector:
    """Finds where the attempts of one run start."""

    def __init__(self, ledger: Ledger, shop: RunContext) -> None:
        self._ledger, self._context = ledger, shop
        self._base: str | None = None
        self._fetch_lock = anyio.Lock()

    async def of(self, task: str, spec: TaskSpec, turn: NextPhase, tips: dict[bool, str]) -> StartPoint:
        """Return where the next attempt of a task starts; `tips` keeps what was asked for others of the same moment.

        Earlier work goes on where it fits onto the target as it is now. Where it does not, what it is to mend is done
        anew, and what only follows it takes it as it is: that it does not fit is for its landing to say.
        """
        document = self._ledger.task(task)
        builds_on_target = self.builds_on_target(task, spec) or turn.start is not None
        if builds_on_target not in tips:
            tips[builds_on_target] = await self.newest(builds_on_target=builds_on_target)
        tip = tips[builds_on_target]
        if turn.start is None:
            return StartPoint(tip)
        with suppress(GitError):  # what it was made of is not here, or the target was rewritten
            if (
                merged := await self._context.target.renew_retry_base(
                    turn.start, tip, self._context.refs(f"again/{task}")
                )
            ) is not None:
                return StartPoint(tip, merged)
        if document.start is None and turn.base is not None:
            return StartPoint(turn.base, turn.start, is_newest=False)
        return StartPoint(tip)

    def builds_on_target(self, task: str, spec: TaskSpec) -> bool:
        """Return whether a task without earlier work starts from the target instead of the base."""
        document = self._ledger.task(task)
        was_stale = any(attempt.outcome in _STALE for attempt in document.attempts)
        return spec.builds_on_target or was_stale or bool(document.expanded)

    async def is_outdated(self, owns: Sequence[str], base: str) -> bool:
        """Whether what a task owns has changed on the target since a base; asked once nobody else can own it."""
        try:
            tip = await self.newest(builds_on_target=True)
        except GitError:  # the landing will tell
            return False
        changed = [] if tip == base else [one.path for one in await self._context.git.changes(base, tip)]
        return len(find_out_of_scope(owns, changed)) < len(changed)

    async def newest(self, *, builds_on_target: bool) -> str:
        """Return the commit that new work starts from: the base as it is now, or the target if it needs others."""
        try:
            async with self._fetch_lock:  # two that fetch the same at once would both fail
                return await self._ask(builds_on_target)
        except GitError:
            # A remote that can't be reached for a moment: what was seen last will do.
            known = self._context.target.known if builds_on_target else self._base
            if known is None:
                raise
            return known

    async def _ask(self, builds_on_target: bool) -> str:
        if builds_on_target:
            return await self._context.target.tip()
        tip = await self._context.source.tip(self._ledger.run.base)
        if tip is not None and tip != self._base:
            self._base = await self._context.source.fetch(self._ledger.run.base, self._context.refs("base"))
        return self._base or self._ledger.run.start
