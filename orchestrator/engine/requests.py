"""What a person asks of a run from another process: recorded in the store, dealt with by the run's owner."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Final

from orchestrator.clock import Clock
from orchestrator.domain.lifecycle import TRANSITIONS, Trigger
from orchestrator.domain.model import FINAL, REVIVABLE, Action, Request, TaskDocument, TaskStatus
from orchestrator.domain.secrets import contains_key
from orchestrator.engine.ledger import Ledger
from orchestrator.engine.records import request_key
from orchestrator.errors import ClaimLost, RefusedError, VersionConflict
from orchestrator.failpoints import failpoint
from orchestrator.protocols import Commit, Event, Store, Write
from orchestrator.repo.hub import work_branch

#: Another orchestrator has just begun a task, or ended it.
_OVERTAKEN: Final = (ClaimLost, VersionConflict)


def check_request(
    action: Action, tasks: Sequence[str], documents: Mapping[str, TaskDocument], blocked: Mapping[str, str]
) -> None:
    """Refuse what can't be done for tasks as they stand; `blocked` are those that wait in vain, with the need."""
    for task in tasks:
        status = documents[task].status
        if action is not Action.RETRY and status in FINAL:
            raise RefusedError(f"task {task!r} is over: it is {status}", f"there is nothing to {action}")
        if action is Action.RETRY and status is TaskStatus.LANDED:
            raise RefusedError(f"task {task!r} has landed", "revert its commit and start a new run to do it again")
        if action is Action.RETRY and task in blocked:
            need = blocked[task]
            raise RefusedError(f"task {task!r} waits for {need!r}, which did not land", f"`council retry {need}`")
        if action is Action.RETRY and status not in REVIVABLE:
            raise RefusedError(f"task {task!r} is not over: it is {status}", "cancel it first, or wait")


def check_reason(reason: str) -> None:
    """Refuse what says nothing, and what may not be recorded."""
    if not reason.strip():
        raise RefusedError("the reason is empty", "say why nobody is to try the task")
    if contains_key(reason):
        raise RefusedError("the reason holds what looks like a secret key, and is recorded", "leave it out")


async def submit(
    store: Store, clock: Clock, run: str, action: Action, tasks: Sequence[str], reason: str | None = None
) -> Request:
    """Record a request; whoever owns the run, or does so next, deals with it."""
    asked = Request(id=secrets.token_hex(4), action=action, tasks=tuple(tasks), asked=clock.now(), reason=reason)
    event = Event("request.made", {"run": run, "request": asked.id, "action": str(action), "tasks": list(tasks)})
    await store.commit(Commit([Write(request_key(run, asked.id), 0, asked.model_dump(mode="json"))], [event]))
    failpoint("request.recorded")
    return asked


async def is_answered(store: Store, run: str, request: Request) -> bool:
    """Whether a request has been dealt with."""
    return await store.get(request_key(run, request.id)) is None


async def obey(ledger: Ledger, request: Request) -> None:
    """Do what was asked of a run in which this process is at nothing; others may be."""
    for task in request.tasks:
        await (revive if request.action is Action.RETRY else cancel)(ledger, task)
    await ignore(ledger, request)
    failpoint("request.obeyed")
    await ledger.answer(request)


async def cancel(ledger: Ledger, task: str) -> bool:
    """End a task that waits for a session or to land, or is another orchestrator's; what it built stays on its branch.

    False if it is over, or being landed: whoever has begun that brings it to its end.
    """
    while await _is_ours_to_cancel(ledger, task):
        document = ledger.task(task)
        branch, reason = document.branch, "on request"
        if document.commit is not None:
            branch = work_branch(ledger.run.id, task, str(document.attempt.number))
        facts = {"reason": reason, "branch": branch}
        try:
            await ledger.change(task, Trigger.CANCEL, facts, **facts)
        except _OVERTAKEN:
            await ledger.refresh(task)
        else:
            return True
    return False


async def _is_ours_to_cancel(ledger: Ledger, task: str) -> bool:
    """Whether a task can be cancelled where it is now; it is taken from whoever has it."""
    while (ledger.task(task).status, Trigger.CANCEL) in TRANSITIONS:
        if not ledger.is_elsewhere(task):
            return True
        if not await ledger.claim(task, is_asked=True) and ledger.is_elsewhere(task):
            return False
    return False


async def ignore(ledger: Ledger, request: Request) -> None:
    """Note of tasks that were cancelled why nobody is to try them; what has landed by then has."""
    for task in request.tasks if request.action is Action.IGNORE else ():
        if ledger.task(task).status is TaskStatus.CANCELLED:
            changes = {"reason": f"ignored: {request.reason}", "ignored": request.reason}
            await ledger.change(task, Trigger.IGNORE, {"reason": request.reason}, **changes)


async def revive(ledger: Ledger, task: str) -> bool:
    """Have a task that is over tried again, with all of its attempts before it; False if it is not over."""
    changes = {"failures": 0, "reason": None, "paths": (), "commit": None, "start": None, "feedback": None}
    while ledger.task(task).status in REVIVABLE:
        try:
            await ledger.change(task, Trigger.REVIVE, {}, ignored=None, **changes)
        except _OVERTAKEN:
            await ledger.refresh(task)
        else:
            return True
    return False
