"""Reserve a task for a user who attaches to its conversation from a terminal."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final, NamedTuple

import anyio

from orchestrator.domain.events.tasks import TaskAttached, TaskDetached
from orchestrator.domain.runs.model import Attachment, Attempt, TaskDocument
from orchestrator.domain.runs.statuses import RETRYABLE_STATUSES, TaskStatus
from orchestrator.domain.scheduling.claims import OwnerStatus
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import attachment_key, read_attachment
from orchestrator.errors import RefusedError, StoreUnavailable, VersionConflict
from orchestrator.protocols import Adapter, Capability, Commit, Write
from orchestrator.sessions.terminal import UserTerminal
from orchestrator.system.failpoints import failpoint

#: Seconds between two checks whether the session of a task has ended.
_POLL_INTERVAL: Final = 0.1


class AttachedTask(NamedTuple):
    """A task to whose conversation a user is attached."""

    task: str
    terminal: UserTerminal


def find_conversation(run: str, task: str, document: TaskDocument) -> Attempt:
    """Return the attempt with the conversation of a task; raise RefusedError if it has none or no session follows."""
    status, option = document.status, f"{shlex.quote(task)} --run {run}"
    if status not in {TaskStatus.PENDING, TaskStatus.RUNNING}:
        message, remedy = f"task {task!r} is {status.record.label}", "add a task to the file, and start a new run"
        if status in RETRYABLE_STATUSES:
            remedy = f"`council retry {option}`, then attach to it"
        elif status is TaskStatus.AWAITING_APPROVAL:
            remedy = f"`council approve {option}` or `council reject {option}`, then attach to it"
        elif not status.record.is_final:
            remedy = "its work is landing; if that fails, retry it, then attach to it"
        raise RefusedError(message, remedy)
    attempt = document.attempt if status is TaskStatus.RUNNING else document.last_conversation
    if attempt is None:
        raise no_conversation(run, task)
    return attempt


def check_attachable(run: str, task: str, document: TaskDocument, adapters: Mapping[str, Adapter]) -> None:
    """Raise RefusedError if a user can't attach to the conversation of a task."""
    attempt = find_conversation(run, task, document)
    if Capability.ATTACH not in adapters[attempt.adapter].capabilities():
        message = f"adapter {attempt.adapter!r} can't open a conversation in a terminal"
        option = f"{shlex.quote(task)} --run {run}"
        remedy = f"send a message: `council tell {option} MESSAGE`; or use an adapter with `attach` for the task"
        raise RefusedError(message, remedy)


def no_conversation(run: str, task: str) -> RefusedError:
    """Return the error for a task without a conversation that a user could attach to."""
    remedy = f"send a message to its next session: `council tell {shlex.quote(task)} --run {run} MESSAGE`"
    return RefusedError(f"task {task!r} has no conversation to attach to", remedy)


@asynccontextmanager
async def record_attachment(ledger: Ledger, task: str) -> AsyncIterator[None]:
    """Reserve a task for a user during the body: other processes stop its session, and start no other one.

    If this process is killed, they continue the task. Raises RefusedError if a user is already attached to it.
    """
    run, me, store = ledger.run.id, ledger.orchestrators.me.id, ledger.writer.store
    key = attachment_key(run, task)
    version, before = await read_attachment(store, run, task)
    if before is not None and await ledger.orchestrators.peers.read_liveness(before.orchestrator) is OwnerStatus.ALIVE:
        raise RefusedError(f"a user is already attached to task {task!r}", "leave that conversation first")
    attachment = Attachment(orchestrator=me, since=ledger.writer.clock.now())
    writes = [Write(key, version, attachment.model_dump(mode="json"))]
    await ledger.writer.commit(Commit(writes, [ledger.writer.event(TaskAttached(task=task))]))
    failpoint("attachment.recorded")
    try:
        yield
    finally:
        # An attachment that can't be deleted ends with this process.
        with anyio.CancelScope(shield=True), suppress(StoreUnavailable, VersionConflict):
            version, _ = await read_attachment(store, run, task)
            released = [ledger.writer.event(TaskDetached(task=task))]
            await store.commit(Commit([Write(key, version, None)], released))


async def wait_until_free(
    ledger: Ledger, task: str, adapters: Mapping[str, Adapter], is_stopping: Callable[[], bool]
) -> bool:
    """Wait until no session of a task runs; return False if the user stops the wait.

    Raises RefusedError if the task then has no conversation to attach to.
    """
    clock = ledger.writer.clock
    renewed = clock.monotonic()
    while not is_stopping():
        await ledger.tasks.refresh(task)
        document = ledger.task(task)
        check_attachable(ledger.run.id, task, document, adapters)
        if document.status is TaskStatus.PENDING:
            ledger.tasks.take_unreported(task)  # otherwise, reporting the end of its session would stop the next one
            return True
        if clock.monotonic() - renewed > ledger.orchestrators.timing.heartbeat_interval:
            await ledger.orchestrators.renew()
            renewed = clock.monotonic()
        await anyio.sleep(_POLL_INTERVAL)
    return False
