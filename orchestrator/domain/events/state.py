"""Events of checkpoints, maintenance, repair, store outages and imports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.domain.events.base import RunEvent, Shown, TypedEvent

if TYPE_CHECKING:
    from orchestrator.domain.documents.times import Instant


class CheckpointCreated(TypedEvent):
    """A checkpoint of the run was created; if the event has no `run`, of all runs."""

    type = "checkpoint.created"
    sentence = "created checkpoint {checkpoint}: {reason}"
    shown = Shown.NEVER

    run: str = ""
    checkpoint: str
    reason: str


class CheckpointRestored(RunEvent):
    """A checkpoint was restored; the changes to its tasks have no separate events."""

    type = "checkpoint.restored"
    sentence = "checkpoint {checkpoint} was restored"

    checkpoint: str
    before: str | None
    """The checkpoint of the previous state."""
    tasks: int
    """The number of changed tasks."""


class StateExpiredDeleted(TypedEvent):
    """Expired documents were deleted."""

    type = "state.expired_deleted"
    sentence = "deleted {count} expired documents"
    shown = Shown.NEVER

    run: str = ""
    count: int
    documents: Sequence[str]
    """The first hundred."""


class StateCompacted(TypedEvent):
    """The log was pruned."""

    type = "state.compacted"
    sentence = "pruned the state log from {before} to {after} bytes"
    shown = Shown.NEVER

    run: str = ""
    before: int
    """Bytes."""
    after: int
    """Bytes."""
    first: int
    """The start of the complete history."""


class StateWarning(RunEvent):
    """A document is too large, a commit was slow, or some records are unreadable."""

    type = "state.warning"
    sentence = "state: {reason}; {remedy}"
    sentence_without = ("remedy", "state: {reason}")
    shown = Shown.NEVER

    about: str
    reason: str
    remedy: str | None


class StateRepaired(TypedEvent):
    """`council state verify --repair` restored a document's last known value.

    Has no `run`.
    """

    type = "state.repaired"
    sentence = "repaired {key}: version {lost_version} was lost"
    shown = Shown.NEVER

    key: str
    lost_version: int
    """The newest version that existed."""
    is_known: bool
    """false if the document was deleted."""


class StateLogRepaired(TypedEvent):
    """Damage in the log was accepted. Has no `run`."""

    type = "state.log_repaired"
    sentence = "repaired {damage} damaged parts of the state log"
    shown = Shown.NEVER

    damage: int
    """The number of damaged parts."""


class StateProbed(TypedEvent):
    """`council state health` measured the latency of a commit. Has no `run`."""

    type = "state.probed"
    sentence = "measured the latency of a commit"
    shown = Shown.NEVER


class StateConflictRecorded(TypedEvent):
    """Conflicting updates of a document wait for a decision. Has no `run`."""

    type = "state.conflict_recorded"
    sentence = "conflicting updates of {key} need a decision (conflict {conflict})"
    shown = Shown.NEVER

    key: str
    writers: Sequence[str]
    conflict: str


class StateConflictAutoResolved(TypedEvent):
    """Conflicting updates of a document were combined. Has no `run`."""

    type = "state.conflict_auto_resolved"
    sentence = "combined conflicting updates of {key} by {strategy}"
    shown = Shown.NEVER

    key: str
    writers: Sequence[str]
    strategy: str


class StateConflictResolved(TypedEvent):
    """A user resolved a conflict. Has no `run`."""

    type = "state.conflict_resolved"
    sentence = "conflict {conflict} of {key} was resolved"
    shown = Shown.NEVER

    key: str
    conflict: str
    writer: str | None
    """null if the user provided another value."""


class LegacyImported(TypedEvent):
    """All state in earlier formats was imported. Has no `run`."""

    type = "legacy.imported"
    sentence = "imported {tasks} tasks from {sources}"

    sources: Sequence[str]
    """The file and the folder."""
    runs: Sequence[str]
    """The ids of the imported runs."""
    tasks: int
    """The number of tasks."""


class LegacyFileSkipped(TypedEvent):
    """A file in an earlier format could not be imported as it is. Has no `run`."""

    type = "legacy.file_skipped"
    sentence = "could not import {path} as is: {reason}"

    path: str
    reason: str
    copy: str | None
    """null if there is no copy."""


class OutageStarted(TypedEvent):
    """The store became unreachable."""

    type = "outage.started"
    sentence = "the state cannot be read or written: {reason} (retrying)"
    shown = Shown.NEVER

    run: str = ""
    mode: str
    """`pause` or `continue`."""
    reason: str
    started: Instant
    """When the outage started, because the event may be recorded later."""


class OutageEnded(TypedEvent):
    """The store is reachable again."""

    type = "outage.ended"
    sentence = "the state can be read and written again"
    shown = Shown.NEVER

    run: str = ""
    mode: str
    """`pause` or `continue`."""
    seconds: float | None
    """null if the process exited during the outage."""
    replayed: int = 0
    """With `continue`: the number of commits that were replayed."""
    refused: int = 0
    """With `continue`: the number of commits that were refused."""


class OutageCommitRejected(TypedEvent):
    """A commit made during the outage was refused."""

    type = "outage.commit_rejected"
    sentence = "not recorded after the outage: {keys}: {reason}"
    shown = Shown.NEVER

    run: str = ""
    keys: Sequence[str]
    """The documents."""
    events: Sequence[str]
    """The types of the events in the commit."""
    reason: str


class OutagePreserved(TypedEvent):
    """The run ended while the store was unreachable: its local commits are preserved."""

    type = "outage.preserved"
    sentence = "the state is unreachable; local commits are preserved in {folder}"
    shown = Shown.NEVER

    run: str = ""
    folder: str


class SteeringCalled(TypedEvent):
    """An agent called a tool of `council mcp --steer`, or read a resource; if about no run, it has no `run`."""

    type = "steering.called"
    sentence = "{quoted_client} called {tool} {arguments}: refused: {refused}"
    sentence_without = ("refused", "{quoted_client} called {tool} {arguments}")
    shown = Shown.NEVER

    run: str = ""
    client: str
    """The name and version that the agent's MCP client gave itself; any text."""
    tool: str
    arguments: str
    """As JSON, at most 2,000 characters."""
    refused: str = ""
    """Why the call was refused; absent if it was performed."""

    @property
    def quoted_client(self) -> str:
        """The client's name in quotes, because it may be any text."""
        return repr(self.client)
