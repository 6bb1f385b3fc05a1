"""Land the built tasks of one run through its merge queue.

A landing first resolves interrupted landings, then merges, checks, records the intent and updates the target. A push
costs more than the rest of a landing, therefore tasks without checks that are ready together land in one push: their
merges follow each other on the first-parent line. Tasks with equal checks are checked and landed together, up to the
size of a batch: as one merge of their merges, so that each commit of that line has passed its checks.

While checks run, the merges of later tasks are checked as well, each on the merge before it (`LookAhead`). These are
only results in a cache: each landing merges again, and needs the results for exactly its own tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import assert_never

import anyio
from anyio.abc import TaskGroup

from orchestrator.domain.events.tasks import TaskLanding
from orchestrator.domain.runs.check_results import CheckRecord, attribute_checks
from orchestrator.domain.runs.model import PreparedMerge, TaskDocument
from orchestrator.domain.runs.retry import retry_delay
from orchestrator.domain.runs.statuses import TaskStatus, Trigger
from orchestrator.domain.scheduling.dispatch import DispatchBoard
from orchestrator.domain.settings.run_settings import Backoff
from orchestrator.engine.checks.base_commands import BaseCommands
from orchestrator.engine.landing.batches import Batches
from orchestrator.engine.landing.look_ahead import LookAhead
from orchestrator.engine.landing.merge_chains import LANDING_ERRORS, MergeChains
from orchestrator.engine.landing.merge_checks import CheckedMerges, MergeChecks
from orchestrator.engine.landing.outcomes import LandingOutcomes, add_intended_merge
from orchestrator.engine.landing.ownership_check import OwnershipCheck
from orchestrator.engine.landing.pull_requests import PullRequests
from orchestrator.engine.landing.rejections import Rejections
from orchestrator.engine.landing.stacked_work import StackedWork
from orchestrator.engine.landing.waiting_tasks import WaitingTasks
from orchestrator.engine.phases.base_selection import BaseSelector
from orchestrator.engine.run_context import RunContext
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.errors import ClaimLost, LeaseLost
from orchestrator.locking.merge_lease import HeldMergeLease, MergeLeaseQueue
from orchestrator.repo.git.command import Git
from orchestrator.repo.landing.target_branch import (
    OWN_PUSH_DESCRIPTION,
    DeferredLanding,
    Landed,
    StaleTarget,
    Target,
    combine_merges,
)
from orchestrator.system import slow_waits
from orchestrator.system.failpoints import failpoint

#: The number of merge attempts of a landing if others keep updating the target, before it is queued again.
MAX_MERGE_ROUNDS = 10

#: The pauses between these attempts.
_ROUND_BACKOFF = Backoff(initial=0.02, factor=2.0, max=1.0, jitter=False)

_CLAIM_LOST = "another process took over a task of the same batch"
_WITHDRAWN = "a task of the same landing was cancelled or held"
_LEASE_LOST = "this process was suspended until its merge lease expired: it requests a new one"


class MergeQueue:
    """Lands the queued tasks of one run, in the order of `domain.scheduling.landing_order`."""

    def __init__(
        self,
        ledger: Ledger,
        context: RunContext,
        base_commands: BaseCommands,
        bases: BaseSelector,
        give_up: Callable[[str], None],
        board: DispatchBoard,
    ) -> None:
        """Create the queue; `give_up` ends the run with a reason if checks can't run.

        `board` has the priorities of the tasks, and those that can no longer start.
        """
        self._ledger, self._clock = ledger, context.tools.clock
        writer, source = ledger.writer, context.source
        self._leases = MergeLeaseQueue(
            writer.store, writer.clock, ledger.orchestrators, source.location, ledger.run.target
        )
        self._target, self._git = context.target, context.git
        ownership = OwnershipCheck(ledger, context.git, context.registry)
        rejections = Rejections(ledger, context.git, ownership)
        self.outcomes = LandingOutcomes(ledger, context.target, context.git, rejections)
        settings = ledger.run.pull_requests
        self.pull_requests = None if settings is None else PullRequests(ledger, context, settings, self.outcomes)
        """The pull requests by which tasks land; None: they land on the target directly."""
        self._stacked = StackedWork(ledger, context, bases, self.outcomes, board.blocked)
        self._chains = MergeChains(ledger, context.target, context.git, self.outcomes, self._stacked)
        self._checks = MergeChecks(ledger, context, ownership, self.outcomes, base_commands, give_up)
        self._batches = Batches(ledger)
        self._look_ahead = LookAhead(ledger, context.target, self._checks, self._batches)
        self.is_moving = False
        """Whether the target is being moved; its refs and checkouts may then be inconsistent."""
        self.tasks = WaitingTasks(ledger, board.entries, self._stacked)
        self.landing: tuple[str, ...] = ()
        """Tasks that `land` is processing."""
        self._lease_wait = anyio.CancelScope()
        self._stopping = False

    def stop(self) -> None:
        """Stop checks and waits.

        Tasks keep their positions. A move of the target still completes.
        """
        self._stopping = True
        self._checks.runs.close()
        if self.is_moving:
            slow_waits.logger.warning("waiting for %s: press Ctrl-C again to exit now", OWN_PUSH_DESCRIPTION)
        self._lease_wait.cancel()

    def add(self, task: str) -> None:
        """Add a built task to the end of the queue."""
        self.tasks.add(task)
        self._look_ahead.update()

    def cancel(self, task: str) -> None:
        """Stop landing a cancelled task.

        A task whose target is, or may have been, moved still completes.
        """
        if task in self.landing:
            self._checks.runs.stop(self.landing)
        elif self.tasks.discard(task) and not self.tasks.has_work:
            self._lease_wait.cancel()

    def remove(self, task: str) -> None:
        """Stop landing a task that has ended, or that this orchestrator no longer owns."""
        self.cancel(task)
        if task in self.tasks.deferred:
            self.tasks.deferred.remove(task)

    async def land(self, group: TaskGroup) -> list[str]:
        """Land the head of the queue; return the tasks that left the queue.

        `group` runs checks of later merges, which may continue after this call. A returned task that is still `QUEUED`
        (or `LANDING`, if it is unknown whether the target moved) is cancelled, or can't land now for the recorded
        reason.
        """
        self._lease_wait = anyio.CancelScope()
        if self._stopping:
            return []
        async with AsyncExitStack() as stack:
            lease = None
            # The holder may be running checks, which can take any time.
            with self._lease_wait:
                lease = await stack.enter_async_context(self._leases.hold())
            if lease is None or not self.tasks.has_work:
                return []
            try:
                return [*await self._settle_stacks(), *await self._land_head(lease, group)]
            finally:
                self.landing = ()

    async def _settle_stacks(self) -> list[str]:
        """Settle stacked work whose base has changed; return the tasks that left the queue."""
        self.landing = tuple(self.tasks.take(self.tasks.unsettled))
        settled, left = await self._stacked.settle(self.landing)
        again = [task for task in settled if task not in self.tasks.cancelled]
        self.tasks.add_first(again)
        self.landing = ()
        return [*left, *(task for task in settled if task not in again)]

    async def _land_head(self, lease: HeldMergeLease, group: TaskGroup) -> list[str]:
        tasks = await self._take()
        if not tasks:
            return []
        self._target.must_exist |= self._ledger.tasks.has_moved_target(self._ledger.run.start)
        try:
            if self._ledger.task(tasks[0]).status is TaskStatus.LANDING:
                remaining = await self.outcomes.recover_interrupted(lease, tasks)
            else:
                ready = [task for task in tasks if not await self.outcomes.continue_for_messages(task)]
                remaining = await self._land_ready(lease, ready, group) if ready else []
        except ClaimLost as lost:
            tasks = [task for task in tasks if task != lost.task]
            remaining = await self.outcomes.requeue_claimed(tasks, _CLAIM_LOST)
        except LeaseLost as lost:
            if lost.subject != str(lease.guard.key):
                raise
            remaining = await self.outcomes.requeue_claimed(tasks, _LEASE_LOST)
        except LANDING_ERRORS as error:
            remaining = []
            for task in tasks:
                await self.outcomes.postpone(task, str(error))
        later = [task for task in remaining if task not in self.tasks.cancelled]
        self.tasks.add_first(later)
        if not self.tasks.ready:
            self._checks.runs.prefetch(group, [])
        await self.outcomes.drop_branches(tasks)
        return [task for task in tasks if task not in later]

    async def _take(self) -> list[str]:
        """Take the tasks of the next landing from the queue.

        These are all tasks whose move was interrupted, or else the head of the queue that may land together.
        """
        batch = self.tasks.interrupted
        if not batch:
            self.tasks.sort()
            async with aclosing(self._batches.divide(self.tasks.ready)) as batches:
                batch = await anext(batches, list[str]())
        self.landing = tuple(self.tasks.take(batch))  # without those that were cancelled in the meantime
        return list(self.landing)

    async def _land_ready(self, lease: HeldMergeLease, tasks: Sequence[str], group: TaskGroup) -> list[str]:
        """Land tasks, or open their pull requests; return the tasks to queue again."""
        if self.pull_requests is None:
            return await self._land_together(lease, tasks, group)
        # A person may have merged it while its session ran: its work would conflict with a squashed commit.
        tasks = [task for task in tasks if not await self.pull_requests.settle(task)]
        if not tasks:
            return []
        merges, checked = await self._prepare_checked(lease, tasks, group)
        for task in merges:
            await self.pull_requests.propose(task, checked.records)
        return list(checked.again)

    async def _land_together(self, lease: HeldMergeLease, tasks: Sequence[str], group: TaskGroup) -> list[str]:
        """Land tasks with one move of the target; return the tasks to queue again."""
        later: list[str] = []
        start = None
        for number in range(1, MAX_MERGE_ROUNDS + 1):
            merges, checked = await self._prepare_checked(lease, tasks, group)
            tasks, later = list(merges), [*checked.again, *later]
            if not tasks:
                break
            start = merges[tasks[0]].old if number == 1 else start
            match await self._move(lease, await self._chains.join(merges), checked.records):
                case Landed():
                    break
                case DeferredLanding() if len(merges) > 1:  # one of them may be the cause
                    for task in tasks:
                        later = [*later, *await self._land_together(lease, [task], group)]
                    break
                case DeferredLanding():
                    break
                case StaleTarget():
                    await self._pause(number)
        else:
            reason = await _describe_moves(self._git, self._target, start or self._ledger.run.start)
            for task in tasks:
                await self.outcomes.defer(task, reason)
        return later

    async def _prepare_checked(
        self, lease: HeldMergeLease, tasks: Sequence[str], group: TaskGroup
    ) -> tuple[dict[str, PreparedMerge], CheckedMerges]:
        """Return the merges that may land now, and the result of their checks with the tasks to queue again."""
        later: list[str] = []
        while True:
            merges, postponed = await self._chains.prepare(lease, tasks)
            alone = await self._checks.judged_alone(merges)
            merges = {task: merge for task, merge in merges.items() if task not in alone}
            later = [*alone, *postponed, *later]
            tasks = [task for task, merge in merges.items() if await self._is_allowed(task, merge)]
            if len(tasks) == len(merges):  # otherwise later merges include one that will not land
                break
        checked = await self._check(lease, merges, group) if merges else CheckedMerges(0)
        return {task: merges[task] for task in tasks[: checked.passed]}, replace(
            checked, again=[*checked.again, *later]
        )

    async def _pause(self, number: int) -> None:
        """Wait between two merge rounds, unless the queue is stopped."""
        self._lease_wait = anyio.CancelScope()
        with self._lease_wait:
            if number < MAX_MERGE_ROUNDS and not self._stopping:
                await anyio.sleep(retry_delay(_ROUND_BACKOFF, number))

    async def _move(
        self, lease: HeldMergeLease, merges: Mapping[str, PreparedMerge], checks: Sequence[CheckRecord]
    ) -> Landed | StaleTarget | DeferredLanding:
        """Record the intent, update the target, and record the result."""
        whole = combine_merges(merges.values())
        intent = whole.model_copy(update={"recorded": self._clock.now()})
        updates = {
            task: _describe_intent(task, self._ledger.task(task), merge, intent, checks)
            for task, merge in merges.items()
        }
        await self._ledger.change_all(updates, [lease.guard])
        failpoint("landing.intended")
        # Read after the intent is recorded: a user who holds a task later finds it landing.
        if await self.tasks.is_any_held(merges):
            await self.outcomes.abort(merges)
            return StaleTarget()
        self.is_moving = True
        try:
            moved = await self._target.move(lease, list(dict.fromkeys(merges.values())))
        finally:
            self.is_moving = False
        match moved:
            case Landed():
                await self.outcomes.record_landed(Trigger.LAND, {task: merge.new for task, merge in merges.items()})
            case DeferredLanding(reason) if len(merges) == 1:
                await self.outcomes.defer(next(iter(merges)), reason)
            case StaleTarget() | DeferredLanding():
                await self.outcomes.abort(merges)
            case _:
                assert_never(moved)
        return moved

    async def _is_allowed(self, task: str, merge: PreparedMerge) -> bool:
        """Return True if a merge may land if its checks pass; otherwise the reason is recorded."""
        is_wanted = not self._stopping and not self.tasks.is_withdrawn(task)
        return is_wanted and await self._checks.is_allowed(task, merge)

    async def _check(
        self, lease: HeldMergeLease, merges: Mapping[str, PreparedMerge], group: TaskGroup
    ) -> CheckedMerges:
        """Check merges and, in `group`, the merges of later tasks."""
        tasks = list(merges)
        checked = await self._look_ahead.check(lease, merges, self._list_uncancelled, group)
        self._batches.record_checked(tasks, checked.culprit)
        if self._stopping:
            return CheckedMerges(0)
        if any(map(self.tasks.is_withdrawn, leading := tasks[: checked.passed])):
            # The merges before a withdrawn one need not pass by themselves.
            await self._checks.requeue(leading, _WITHDRAWN)
            return CheckedMerges(0, [*leading, *checked.again] if len(tasks) > 1 else ())
        return checked

    def _list_uncancelled(self) -> list[str]:
        self.tasks.sort()
        return [task for task in self.tasks.ready_behind(self.landing) if task not in self.tasks.cancelled]


def _describe_intent(
    task: str, document: TaskDocument, merge: PreparedMerge, intent: PreparedMerge, checks: Sequence[CheckRecord]
) -> TaskUpdate:
    """Return the update that records the intent to land a task, with the results of its checks."""
    number = document.building_attempt.number
    return TaskUpdate(
        Trigger.INTEND,
        TaskLanding(old=merge.old, new=merge.new),
        {
            "landing_intent": intent,
            "intended_merges": add_intended_merge(document.intended_merges, merge.new),
            "attempts": document.with_attempt(number, checks=attribute_checks(checks, task)),
        },
    )


async def _describe_moves(git: Git, target: Target, start: str) -> str:
    """Describe the commits since `start`, which made each round of a landing start over, and the fix.

    The merge lease has been held since then, so no other run has landed.
    """
    tip = await target.refresh()
    count = int(await git.line("rev-list", "--first-parent", "--count", f"{start}..{tip}"))
    moved = f"others added commits to {target.branch!r} ({count}, newest {tip:.10})"
    if not count:
        moved = f"each push to {target.branch!r} was interrupted or reverted"
    return (
        f"{moved} during {MAX_MERGE_ROUNDS} landing attempts: pause commits to it until the task has landed "
        "(a repository hook may create them), or make its checks faster"
    )
