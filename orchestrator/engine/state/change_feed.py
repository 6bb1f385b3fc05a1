"""Follow the changes to a run by other orchestrators and by users."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import Final, NamedTuple

from orchestrator.domain.runs.model import HaltCause, RunRequest, TaskDocument
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import read_requests, read_tasks, run_key
from orchestrator.errors import HistoryCompacted
from orchestrator.protocols import CommitRecord, JsonObject, Key

_FOLLOWED_KINDS: Final = frozenset({"adapter", "attachment", "request", "run", "task"})


class ExternalChange(NamedTuple):
    """A change or request by another orchestrator or a user."""

    task: str | None = None
    """The task whose status changed; its new state is in the ledger."""
    before: TaskDocument | None = None
    """The state of the task before the change."""
    retry_in: float | None = None
    """Seconds until the task may be retried, if it waits for a retry."""
    adapter: str | None = None
    """The adapter whose document changed."""
    request: RunRequest | None = None
    halted: tuple[HaltCause, str] | None = None
    """The cause of an early stop of the run and the reason for it."""
    attachment: str | None = None
    """The task to which a user attaches, or was attached."""
    has_new_tasks: bool = False
    """Whether plans were expanded to tasks, which are in the ledger."""


async def follow_changes(ledger: Ledger) -> AsyncGenerator[ExternalChange]:
    """Yield pending requests, then changes and requests of others when committed."""
    store, tasks = ledger.writer.store, ledger.tasks
    while True:
        position = await store.position()
        if await tasks.load_new():
            yield ExternalChange(has_new_tasks=True)
        documents = await read_tasks(store, ledger.run.id)  # later changes come from the log
        for task in ledger.run.tasks:
            await tasks.wait_settled(task)
            if task in documents and documents[task].version > tasks.version(task):
                await tasks.refresh(task)
            if (before := tasks.take_unreported(task)) is not None:
                yield ExternalChange(task, before)
        for request in await read_requests(store, ledger.run.id):
            yield ExternalChange(request=request)
        for document in await store.list("attachment", f"{ledger.run.id}/"):
            yield ExternalChange(attachment=document.key.id.partition("/")[2])
        with suppress(HistoryCompacted):  # after a long suspension, reload
            async for record in store.watch(position):
                async for change in _changes_in(ledger, record):
                    yield change


async def _changes_in(ledger: Ledger, record: CommitRecord) -> AsyncGenerator[ExternalChange]:
    run = ledger.run.id
    if run_key(run) in record.documents and await ledger.tasks.load_new():
        yield ExternalChange(has_new_tasks=True)
    for key in record.documents:
        if key.kind in _FOLLOWED_KINDS and f"{key.id}/".startswith(f"{run}/"):
            version, value = record.documents[key]
            if key.kind == "attachment":
                yield ExternalChange(attachment=key.id.partition("/")[2])
                continue
            if value is None:
                continue
            if key.kind == "task":
                await ledger.tasks.wait_settled(key.id.partition("/")[2])
            for change in _changes_of_document(ledger, record, key, version, value):
                yield change


def _changes_of_document(
    ledger: Ledger, record: CommitRecord, key: Key, version: int, value: JsonObject
) -> Iterable[ExternalChange]:
    name = key.id.partition("/")[2]
    if key == run_key(ledger.run.id):
        if value["halted"] is not None:
            yield ExternalChange(halted=(HaltCause(value.get("halt_cause") or HaltCause.BUDGET), value["halted"]))
        else:
            yield ExternalChange()  # a user may hold or release tasks
    elif key.kind == "request":
        yield ExternalChange(request=RunRequest.model_validate(value))
    elif key.kind == "adapter":
        yield ExternalChange(adapter=name)
    elif key.kind == "task" and ledger.tasks.is_news(name, version):
        before = ledger.tasks.take_unreported(name) or ledger.tasks[name]
        if version > ledger.tasks.version(name):
            if ledger.claims is not None:
                ledger.claims.mark_released(name)
            ledger.tasks.apply(name, version, TaskDocument.model_validate(value))
        elif ledger.claims is not None and name in ledger.claims:
            return  # already reloaded by the takeover
        delays = [event.data.get("retry_in") for event in record.events if event.data.get("task") == name]
        yield ExternalChange(name, before, next(filter(None, delays), None))
