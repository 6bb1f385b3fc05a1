"""Follow the open pull requests of a run: land, continue or cancel their tasks as people and the forge decide."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Final

import anyio
from tenacity import AsyncRetrying, retry_if_result, wait_exponential
from tenacity.wait import wait_base

from orchestrator.domain.events.runs import ForgeFailing, ForgeRecovered
from orchestrator.domain.events.tasks import TaskDeferred, TaskRetrying
from orchestrator.domain.runs.model import RequestAction, RunRequest
from orchestrator.domain.runs.statuses import FINAL_STATUSES, SUCCESS_STATUSES, TaskStatus, Trigger
from orchestrator.domain.settings.failures import FailureClass
from orchestrator.domain.workflow.routing import restart_task
from orchestrator.engine.landing.pull_request_verdicts import (
    Closed,
    Continues,
    Merged,
    Waits,
    judge_pull_request,
    render_feedback,
)
from orchestrator.engine.landing.pull_requests import (
    PullRequests,
    call_forge,
    describe_failure,
    describe_missing_merge,
)
from orchestrator.engine.scheduler.local_work import LocalWork
from orchestrator.engine.scheduler.requests import request_record
from orchestrator.engine.state.forge_changes import ForgeChanges
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import ClaimLost, GitError, PluginFailed, RefusedError, StoreUnavailable, VersionConflict
from orchestrator.protocols import Commit, Event, Forge, PullRequest
from orchestrator.repo.worktrees.hub import pull_request_branch_name
from orchestrator.system.clock import Clock
from orchestrator.system.failpoints import failpoint

_RETRY_WAIT: Final[wait_base] = wait_exponential(max=60.0)
#: Tasks whose pull request has no further effect; others may have failed, and their pull request is merged anyway.
_UNFOLLOWED: Final = SUCCESS_STATUSES | {TaskStatus.CANCELLED}
#: The errors if another process has just changed a task: the next reading applies.
_OVERTAKEN: Final = (ClaimLost, VersionConflict)


class PullRequestFollower:
    """Applies the states of pull requests to their tasks, in the process that leads the run."""

    def __init__(self, ledger: Ledger, proposals: PullRequests, local: LocalWork, clock: Clock) -> None:
        self._ledger, self._proposals, self._local, self._clock = ledger, proposals, local, clock
        self._is_failing = False
        self._changes = ForgeChanges(ledger.writer.store, ledger.run.id, clock)
        self.is_busy = False
        """Whether a task is being changed, which may create work."""

    async def run(self) -> None:
        """Read the pull requests every `sync_interval` until cancelled."""
        await self._ledger.writer.became_leader.wait()
        retrying = AsyncRetrying(retry=retry_if_result(lambda _: True), wait=_RETRY_WAIT, sleep=self._changes.wait)
        async with anyio.create_task_group() as group:
            group.start_soon(self._changes.watch)
            await retrying(self._follow)

    async def _follow(self) -> None:
        """Read until a failure, which is reported once."""
        try:
            async with self._proposals.connect() as forge:
                while True:
                    await self._read_all(forge)
                    await self._report(None)
                    await self._changes.wait(self._proposals.settings.sync_interval)
        except (GitError, RefusedError, PluginFailed, TimeoutError) as error:
            await self._report(describe_failure(error))
        except StoreUnavailable:  # mandatory commits report the outage
            return

    async def _report(self, reason: str | None) -> None:
        if self._is_failing == (reason is not None):
            return
        self._is_failing = reason is not None
        await self._ledger.note(ForgeRecovered() if reason is None else ForgeFailing(reason=reason))

    async def _read_all(self, forge: Forge) -> None:
        for task in self._ledger.run.tasks:
            document = self._ledger.task(task)
            number = document.pull_request
            if document.proposal is None or number is None or document.status in _UNFOLLOWED:
                continue
            found = await call_forge(partial(forge.read, number))
            # A partial change would leave the board and the documents inconsistent.
            with anyio.CancelScope(shield=True):
                self.is_busy = True
                try:
                    await self._apply(task, found)
                except _OVERTAKEN:
                    continue
                finally:
                    self.is_busy = False
                    self._local.wake()  # for a new attempt, or a stop that waits for this

    async def _apply(self, task: str, found: PullRequest) -> None:
        document = self._ledger.task(task)
        if document.proposal is None or document.status in _UNFOLLOWED or self._ledger.is_claimed_elsewhere(task):
            return
        match judge_pull_request(found, document.proposal, self._proposals.settings):
            case Merged():
                if document.status is TaskStatus.LANDING or task in self._local.merge_queue.landing:
                    return
                if await self._proposals.record_merge(task, found):
                    self._local.sync_task(task)
                else:
                    await self._note(task, describe_missing_merge(found, self._ledger.run.target))
            case Closed() if document.status not in FINAL_STATUSES:
                await self._cancel(task, found)
            case Continues() as continues if document.status is TaskStatus.PROPOSED:
                await self._continue(task, found, continues)
            case Waits(reason):
                await self._note(task, reason)

    async def _note(self, task: str, reason: str) -> None:
        """Record why a pull request is not merged."""
        document = self._ledger.task(task)
        if document.status is TaskStatus.PROPOSED and document.reason != reason:
            await self._ledger.change(task, Trigger.DEFER, TaskDeferred(reason=reason), reason=reason)

    async def _cancel(self, task: str, found: PullRequest) -> None:
        """Request the end of a task whose pull request someone closed."""
        request = RunRequest(
            id=f"pull-request-{found.number}",
            action=RequestAction.CANCEL,
            tasks=(task,),
            asked=self._clock.now(),
            reason=f"pull request {found.number} was closed",
        )
        write, event = request_record(self._ledger.run.id, request)
        await self._ledger.writer.store.commit(Commit([write], [Event.of(event)]))
        failpoint("pull_request.cancelled")

    async def _continue(self, task: str, found: PullRequest, continues: Continues) -> None:
        """Continue a task from the newest commit of its branch, which may have commits of others."""
        document, run = self._ledger.task(task), self._ledger.run.id
        assert document.proposal is not None, "it has a pull request"  # noqa: S101  the caller has checked it
        head = await self._proposals.fetch_head(task, pull_request_branch_name(run, task))
        if head != found.head:  # pushed just now: the next reading applies
            return
        spec = await self._ledger.definitions.spec(task)
        branch = self._ledger.work_branch(task)
        failure = FailureClass.CHECKS_FAILED if continues.failures else FailureClass.REJECTED
        proposal = document.proposal.model_copy(
            update={"rounds": document.proposal.rounds + 1, "handled": tuple(continues.handled)}
        )
        changes = {
            "start": head,
            "base": document.built_base,
            "feedback": render_feedback(continues, found.number, secrets.token_hex(8)),
            "proposal": proposal,
            "commit": None,
            "built_by": None,
            "reason": continues.reason,
            **restart_task(self._ledger.definitions.workflow(spec.workflow), document),
        }
        event = TaskRetrying(outcome=failure, reason=continues.reason, branch=branch)
        await self._ledger.change(task, Trigger.RETRY_WORK, event, **changes)
        failpoint("pull_request.continued")
        self._local.resume(task)
