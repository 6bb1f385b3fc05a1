"""The trackers of forges: what to read, what to show, and what people requested.

A forge is the place where people look, so a person's change wins: a closed issue cancels its task, and a label or a
comment of someone with write access requests an action. Nothing that `council` wrote itself is read as a request.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Final, Self, TypeVar

from pydantic import Field

from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.settings.fields import Duration, Strings
from orchestrator.errors import RefusedError
from orchestrator.forges.connection import Connected, Members, RepositoryOptions
from orchestrator.forges.issue_api import IssueApi
from orchestrator.forges.issues import (
    RETRY_LABEL,
    Issue,
    find_requests,
    issue_number,
    issue_text,
    needed_issues,
    retry_events,
    task_id,
    to_tasks,
)
from orchestrator.forges.state_comment import (
    STATUS_LABELS,
    SharedState,
    describe,
    is_outdated,
    is_state_comment,
    read_state,
    status_label,
    to_shared,
    write_comment,
)
from orchestrator.protocols import SyncResult, TrackedState, TrackedTask

_TOKEN_TIMEOUT: Final = 10.0


class ForgeOptions(RepositoryOptions):
    """The options of all trackers of forges."""

    labels: Strings = ()
    """Only issues with all of these labels."""
    milestone: str | None = None
    """Only issues of the milestone with this title."""
    assignee: str | None = None
    """Only issues that are assigned to this user."""
    close: bool = True
    """Whether to close the issue of a task that has landed."""
    stale_after: Annotated[Duration, Field(gt=0)] = 300.0
    """How long after its last sign of life another run's claim on an issue expires."""


OptionsT = TypeVar("OptionsT", bound=ForgeOptions)


class ForgeTracker(Connected[OptionsT], ABC):
    """A tracker whose tasks are issues of a repository."""

    def __init__(self, options: OptionsT, /) -> None:
        super().__init__(options)
        self._issues: IssueApi
        self._passed_on = frozenset[str]()
        """The requests of the previous synchronization, which are recorded by now."""

    @abstractmethod
    def issue_api(self, members: Members) -> IssueApi:
        """Return the issues of the repository."""

    async def __aenter__(self) -> Self:
        """Open the connection."""
        await super().__aenter__()
        self._issues = self.issue_api(self._members)
        return self

    async def tasks(self) -> Sequence[TrackedTask]:
        """Return the tasks of the selected issues, except those that another live run claims."""
        now, stale_after = time.time(), self._options.stale_after
        issues = []
        for issue in await self._issues.open_issues():
            _, shared = _shown_state(_state_comments(issue))
            if shared is None or not shared.is_claimed(now, stale_after):
                issues.append(_without_own_comments(issue))
        listed = {issue.number for issue in issues}
        others = {need for issue in issues for need in needed_issues(issue)} - listed
        tasks = to_tasks(issues, await self._issues.open_among(others))
        past = {task_id(one.number): find_requests(one, task_id(one.number), has_ended=False) for one in issues}
        return [replace(task, past_requests=[one.id for one in past[task.id]]) for task in tasks]

    async def sync(self, states: Sequence[TrackedState]) -> SyncResult:
        """Show the states on the issues, and return what people requested there."""
        by_number = {number: state for state in states if (number := issue_number(state.id)) is not None}
        issues = await self._issues.issues(by_number)
        requests, conflicts, abandoned = [], [], []
        texts = {by_number[one.number].id: issue_text(one) for one in issues if one.is_trusted}
        problem: RefusedError | None = None
        for issue in issues:
            state = by_number[issue.number]
            requests += find_requests(_without_own_comments(issue), state.id, has_ended=state.has_ended)
            if self._is_abandoned(issue, state):
                abandoned.append(state.id)
            try:
                if problem is None and not await self._show(issue, state):
                    conflicts.append(state.id)
            except RefusedError as error:  # a token that may only read, for example: people's requests still count
                problem = error
        self._passed_on = frozenset(request.id for request in requests)
        return SyncResult(requests, conflicts, abandoned, problem, texts)

    def _is_abandoned(self, issue: Issue, state: TrackedState) -> bool:
        """Return True if an open issue shows another run that neither ended its task nor is alive."""
        _, shown = _shown_state(_state_comments(issue))
        if shown is None or shown.run == state.run or shown.has_ended:
            return False
        return issue.is_open and not shown.is_claimed(time.time(), self._options.stale_after)

    async def _show(self, issue: Issue, state: TrackedState) -> bool:
        """Show a state on its issue; return False if another live run claims the issue."""
        comments = _state_comments(issue)
        comment, shown = _shown_state(comments)
        for id_, other in comments[1:]:  # two runs may write the first comment at the same moment
            if other is not None and other.run == state.run:
                await self._issues.delete_comment(issue.number, id_)
        now, stale_after = time.time(), self._options.stale_after
        if shown is not None and shown.run != state.run:
            if shown.is_claimed(now, stale_after):
                return False
            if state.task["status"] == TaskStatus.CANCELLED:  # it was left to the run shown
                return True
        shared = to_shared(state, now)
        is_shown = shown is not None and (shown.run, shown.status) == (shared.run, shared.status)
        if state.is_done and self._options.close and issue.is_open and not is_shown:
            await self._issues.close(issue.number)
        await self._show_label(issue, state)
        # Last: it records that the rest is shown, so that a person can reopen the issue afterwards.
        if is_outdated(shown, shared, stale_after / 2):
            await self._issues.write_comment(issue.number, comment, write_comment(describe(state), shared))
        return True

    async def _show_label(self, issue: Issue, state: TrackedState) -> None:
        shown = frozenset({status_label(state.task["status"])})
        removed = (issue.labels & STATUS_LABELS) - shown
        asked = {f"label-{event}" for event in retry_events(issue)}
        if asked and asked <= self._passed_on:
            removed |= {RETRY_LABEL}
        added = shown - issue.labels
        if added or removed:
            await self._issues.change_labels(issue.number, added, removed)


def _state_comments(issue: Issue) -> list[tuple[int, SharedState | None]]:
    """Return the ids of the comments that show states, of authors with write access, and the states.

    A state is None if its hidden block is damaged.
    """
    return [(one.id, read_state(one.body)) for one in issue.comments if one.is_trusted and is_state_comment(one.body)]


def _shown_state(comments: Sequence[tuple[int, SharedState | None]]) -> tuple[int | None, SharedState | None]:
    """Return the first comment that shows a state: it decides which run has the issue."""
    return comments[0] if comments else (None, None)


def _without_own_comments(issue: Issue) -> Issue:
    """Return an issue without the comments that show states, by any author."""
    return replace(issue, comments=tuple(one for one in issue.comments if not is_state_comment(one.body)))
