"""Deliver the messages of the user to running sessions.

Two hooks of a CLI ask for messages: one when its agent is about to end its turn, and one after each tool call. The
latter asks only if a file in the session's folder announces a message, so that a tool call usually costs no request.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import anyio.to_thread

from orchestrator.domain.events.tasks import TaskMessageDelivered
from orchestrator.domain.sessions.messages import UserMessage, render_messages
from orchestrator.engine.session_api.locks import ActiveSession
from orchestrator.engine.state.records import message_write, read_messages
from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, CommitRecord, Event, JsonObject, Store
from orchestrator.system.failpoints import failpoint


class MessageDelivery:
    """Delivers each message to one session."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def deliver(self, active: ActiveSession) -> str | None:
        """Record that a session receives the messages that no session has received; return their text, if any."""
        # First, because a message may arrive after they are read.
        await anyio.to_thread.run_sync(_remove, active.workspace.worktree.message_file)
        due = await self._record_delivery(active)
        return render_messages(due)

    async def _record_delivery(self, active: ActiveSession) -> list[UserMessage]:
        name = active.name
        guards = [] if active.claim is None else [active.claim]
        while due := [one for one in await read_messages(self._store, name.run, name.task) if not one.attempts]:
            writes = [message_write(name.run, name.task, message.with_attempt(name.attempt)) for message in due]
            events = [
                TaskMessageDelivered(run=name.run, task=name.task, attempt=name.attempt, message=message.id)
                for message in due
            ]
            with suppress(VersionConflict):  # a message was withdrawn just before, or another hook delivers it
                await self._store.commit(Commit(writes, [Event.of(event) for event in events], guards))
                failpoint("message.delivered")
                return due
        return []

    async def take(self, active: ActiveSession) -> JsonObject:
        """Return new messages of the user as an answer to a session."""
        return {"message": await self.deliver(active)}

    async def announce(self, record: CommitRecord, sessions: Iterable[ActiveSession]) -> None:
        """Announce the messages in a commit to the running sessions of their tasks. Best effort."""
        new = {key.id for key, (_, value) in record.documents.items() if key.kind == "message" and _is_new(value)}
        tasks = {key.rpartition("/")[0] for key in new}
        for active in sessions:
            if f"{active.name.run}/{active.name.task}" in tasks:
                with suppress(OSError):  # no program runs: it receives the messages at the end of its turn
                    await anyio.to_thread.run_sync(_create, active.workspace.worktree.message_file)


def _is_new(message: JsonObject | None) -> bool:
    return message is not None and not message["attempts"]


def _create(file: Path) -> None:
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _remove(file: Path) -> None:
    with suppress(OSError):  # its folder may be removed
        file.unlink(missing_ok=True)
