"""One task through the merge queue: settle what was cut off, merge, record the intent, move the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from orchestrator.clock import Clock
from orchestrator.domain.lifecycle import Trigger
from orchestrator.domain.model import Intent, TaskStatus
from orchestrator.engine.ledger import Ledger
from orchestrator.errors import GitError
from orchestrator.failpoints import failpoint
from orchestrator.repo.git import Git
from orchestrator.repo.hub import work_branch
from orchestrator.repo.landing import AlreadyThere, Conflict, Deferred, Landed, Merge, MergePermit, Stale, Target

#: How often a landing is merged anew because others moved the target, before it waits for its next turn.
ROUNDS = 10


@dataclass(frozen=True, slots=True)
class MergeQueue:
    """Lands the queued tasks of one run, one at a time."""

    ledger: Ledger
    target: Target
    git: Git
    clock: Clock

    async def land(self, task: str) -> TaskStatus:
        """Bring a queued task onto the target; return its status after it.

        `QUEUED` (or `LANDING`, where it is not known whether the target moved) means that it keeps its place:
        the target can't be moved now, and the reason is recorded.
        """
        async with self.target.permit() as permit:
            try:
                again = self.ledger.task(task).status is TaskStatus.QUEUED or await self._settle(permit, task)
                for _ in range(ROUNDS):
                    if not again:
                        break
                    again = await self._try(permit, task)
            except GitError as error:
                await self._unreachable(task, str(error))
        await self._drop_branch(task)
        return self.ledger.task(task).status

    async def verify(self) -> None:
        """Make sure that what has landed is still on the target, which somebody else may have rewritten."""
        landings = await self.target.landings()
        for task in self.ledger.run.tasks:
            document = self.ledger.task(task)
            if document.landed is None or self._label(task) in landings or await self.target.holds(document.landed):
                continue
            branch = work_branch(self.ledger.run.id, task, str(document.attempt.number))
            await self.git("update-ref", f"refs/heads/{branch}", document.commit or document.landed)
            reason = f"its commit {document.landed[:10]} is no longer on the target, which was rewritten"
            details = {"reason": reason, "branch": branch}
            await self.ledger.change(task, Trigger.LOSE, details, landed=None, branch=branch, reason=reason)

    async def _try(self, permit: MergePermit, task: str) -> bool:
        """Merge and move once; True if that should be done again at once."""
        label, document = self._label(task), self.ledger.task(task)
        merge = await self.target.prepare(permit, label, document.commit or "", document.attempt.base)
        match merge:
            case Landed(commit):
                await self._landed(task, Trigger.ADOPT, commit)
            case AlreadyThere(commit):
                await self._landed(task, Trigger.ADOPT, commit, "the target holds the same change already")
            case Conflict(paths, commit):
                branch = work_branch(self.ledger.run.id, task, "conflict")
                await self.git("update-ref", f"refs/heads/{branch}", commit)
                reason = f"conflicts with the target in {', '.join(paths)}"
                details = {"reason": reason, "branch": branch, "paths": list(paths)}
                await self.ledger.change(task, Trigger.CONFLICT, details, reason=reason, branch=branch, paths=paths)
            case Deferred():
                await self._moved(task, merge)
            case Merge(old, new):
                intent = Intent(old=old, new=new, recorded=self.clock.now())
                await self.ledger.change(task, Trigger.INTEND, {"old": old, "new": new}, intent=intent)
                failpoint("landing.intended")
                return await self._moved(task, await self.target.move(permit, merge, label))
            case _:
                assert_never(merge)
        return False

    async def _moved(self, task: str, result: Landed | Stale | Deferred) -> bool:
        match result:
            case Landed(commit):
                await self._landed(task, Trigger.LAND, commit)
            case Stale():
                await self.ledger.change(task, Trigger.UNDO, intent=None)
                return True
            case Deferred(reason):
                await self.ledger.change(task, Trigger.DEFER, {"reason": reason}, intent=None, reason=reason)
            case _:
                assert_never(result)
        return False

    async def _settle(self, permit: MergePermit, task: str) -> bool:
        """Find out what became of a move that was cut off; True if it did not happen and should be made now."""
        intent = self.ledger.task(task).intent
        assert intent is not None, "a task is landing only by an intent"  # noqa: S101  an invariant of the table
        merge = Merge(intent.old, intent.new)
        again = await self._moved(task, await self.target.settle(permit, merge, self._label(task), intent.recorded))
        failpoint("recovery.landing_settled")
        return again

    async def _landed(self, task: str, trigger: Trigger, commit: str, reason: str | None = None) -> None:
        details = {"landed": commit, "reason": reason}
        await self.ledger.change(task, trigger, details, landed=commit, intent=None, reason=reason, branch=None)
        failpoint("landing.recorded")

    async def _unreachable(self, task: str, why: str) -> None:
        """Keep the task's place; with an intent under way it stays `landing` until the target can be asked."""
        if self.ledger.task(task).status is TaskStatus.QUEUED:
            await self.ledger.change(task, Trigger.DEFER, {"reason": why}, reason=why)
        else:
            await self.ledger.note("task.deferred", {"task": task, "reason": why})

    async def _drop_branch(self, task: str) -> None:
        document = self.ledger.task(task)
        if document.status is TaskStatus.LANDED and document.commit is not None:
            branch = work_branch(self.ledger.run.id, task, str(document.attempt.number))
            await self.git("update-ref", "-d", f"refs/heads/{branch}")

    def _label(self, task: str) -> str:
        return f"{self.ledger.run.id}/{task}"
