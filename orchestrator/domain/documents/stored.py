"""Models of stored documents without behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from orchestrator.domain.documents.times import Instant

LockMode = Literal["read", "write"]


class CheckpointOrigin(StrEnum):
    """The origin of a checkpoint."""

    USER = "user"
    TIMER = "timer"  #: an active run, periodically; only the newest are retained
    COMMAND = "command"  #: a command, before a destructive change


class StoredDocument(BaseModel):
    """The base of stored documents, and of their parts."""

    # Building a model takes about a millisecond, and no process needs all of them.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class _Stored(StoredDocument):
    model_config = ConfigDict(extra="allow")


class RunLease(_Stored):
    """The leader of a run (`lease/run/<run>`)."""

    orchestrator: str
    epoch: int


class Cursor(_Stored):
    """The position of a sink, or what is known about a tracker."""

    position: int = 0
    handled: list[str] = Field(default_factory=list)
    """The requests that were passed on."""
    failing: str | None = None
    """The reason why the last synchronization failed; None: it did not."""
    texts: dict[str, str] = Field(default_factory=dict)
    """The digests of the texts of tasks that sessions know, by task."""


class SharedValue(_Stored):
    """A value that the sessions of a run share."""

    value: JsonValue
    writer: str | None
    time: Instant


class PortsRecord(_Stored):
    """The worktree slot that uses a port, with all ports of the slot."""

    slot: str
    ports: list[int]


class ConflictCandidate(StoredDocument):
    """An update in a conflict; see `domain.documents.conflicts.DocumentUpdate`."""

    time: Instant
    writer: str
    value: dict[str, Any] | None
    base: int | None


class ConflictRecord(_Stored):
    """Conflicting updates of the document `key` (kind and id), which was at `version`."""

    key: tuple[str, str]
    version: int
    candidates: tuple[ConflictCandidate, ...]


@dataclass(frozen=True, slots=True)
class CheckpointSession:
    """An active task: `status` is running, checking or landing."""

    run: str
    task: str
    attempt: int
    status: str


class CheckpointRecord(_Stored):
    """A named position of the log, with a summary."""

    position: int
    """The position of the last commit that it includes."""
    reason: str
    created_by: CheckpointOrigin
    status: str | None
    """`running`, `interrupted`, `landed` or `incomplete`; None for the whole store or a damaged run."""
    task_counts: dict[str, int]
    """The number of tasks by status; `damaged` counts unreadable ones."""
    sessions: tuple[CheckpointSession, ...]


@dataclass(frozen=True, slots=True)
class LockInfo:
    """A held or requested named lock. Times are in wall-clock seconds."""

    id: str
    """Unique for each acquisition."""
    name: str
    mode: LockMode
    owner: str
    acquired_at: Instant
    """For a waiter: the time of the request."""
    expires_at: Instant
    host: str
    boot: str
    pid: int
    started: int | None


class NamedLock(_Stored):
    """The holders and waiters of a named lock."""

    holders: tuple[LockInfo, ...]
    waiters: tuple[LockInfo, ...]
