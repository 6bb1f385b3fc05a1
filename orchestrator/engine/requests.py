"""What a person asks of a run from another process: recorded in the store, dealt with by the run's owner."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from orchestrator.clock import Clock
from orchestrator.domain.lifecycle import TRANSITIONS, Trigger
from orchestrator.domain.model import REVIVABLE, Action, Request, TaskDocument, TaskStatus
from orchestrator.engine.ledger import Ledger, request_key
from orchestrator.errors import RefusedError
from orchestrator.failpoints import failpoint
from orchestrator.protocols import Commit, Event, Store, Write
from orchestrator.repo.hub import work_branch


def check_request(
    action: Action, tasks: Sequence[str], documents: Mapping[str, TaskDocument], blocked: Mapping[str, str]
) -> None:
    """Refuse what can't be done for tasks as they stand; `blocked` are those that wait in vain, with the need."""
    for task in tasks:
        status = documents[task].status
        if action is Action.CANCEL and status in REVIVABLE | {TaskStatus.LANDED}:
            raise RefusedError(f"task {task!r} is over: it is {status}", "there is nothing to cancel")
        if action is Action.RETRY and status is TaskStatus.LANDED:
            raise RefusedError(f"task {task!r} has landed", "revert its commit and start a new run to do it again")
        if action is Action.RETRY and task in blocked:
            need = blocked[task]
            raise RefusedError(f"task {task!r} waits for {need!r}, which did not land", f"`council retry {need}`")
        if action is Action.RETRY and status not in REVIVABLE:
            raise RefusedError(f"task {task!r} is not over: it is {status}", "cancel it first, or wait")


async def submit(store: Store, clock: Clock, run: str, action: Action, tasks: Sequence[str]) -> Request:
    """Record a request; whoever owns the run, or does so next, deals with it."""
    asked = Request(id=secrets.token_hex(4), action=action, tasks=tuple(tasks), asked=clock.now())
    event = Event("request.made", {"run": run, "request": asked.id, "action": str(action), "tasks": list(tasks)})
    await store.commit(Commit([Write(request_key(run, asked.id), 0, asked.model_dump(mode="json"))], [event]))
    failpoint("request.recorded")
    return asked


async def is_answered(store: Store, run: str, request: Request) -> bool:
    """Whether a request has been dealt with."""
    return await store.get(request_key(run, request.id)) is None


async def obey(ledger: Ledger, request: Request) -> None:
    """Do what was asked of a run at which nothing is at work."""
    for task in request.tasks:
        await (cancel if request.action is Action.CANCEL else revive)(ledger, task)
    failpoint("request.obeyed")
    await ledger.answer(request)


async def cancel(ledger: Ledger, task: str) -> bool:
    """End a task that waits for a session or to land; what it built stays on its branch. False if it is over."""
    document = ledger.task(task)
    if (document.status, Trigger.CANCEL) not in TRANSITIONS:
        return False
    branch = document.branch
    if document.commit is not None:
        branch = work_branch(ledger.run.id, task, str(document.attempt.number))
    reason = "on request"
    await ledger.change(task, Trigger.CANCEL, {"reason": reason, "branch": branch}, reason=reason, branch=branch)
    return True


async def revive(ledger: Ledger, task: str) -> bool:
    """Have a task that is over tried again, with all of its attempts before it; False if it is not over."""
    if ledger.task(task).status not in REVIVABLE:
        return False
    changes = {"failures": 0, "reason": None, "paths": (), "commit": None, "start": None, "feedback": None}
    await ledger.change(task, Trigger.REVIVE, {}, **changes)
    return True
