"""What a run and its tasks are while they are persisted: the documents behind every decision."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class TaskStatus(StrEnum):
    """Where a task is. Blocked and leased are derived from other facts, never stored."""

    PENDING = "pending"
    RUNNING = "running"
    QUEUED = "queued"  #: built, in the merge queue
    LANDING = "landing"  #: the intent to move the target is recorded
    LANDED = "landed"
    NO_CHANGE = "no_change"
    CONFLICT = "conflict"
    FAILED = "failed"


#: States in which the run has nothing left to do for a task.
FINAL = frozenset({TaskStatus.LANDED, TaskStatus.NO_CHANGE, TaskStatus.CONFLICT, TaskStatus.FAILED})


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Attempt(_Document):
    """One try of a task, recorded before anything of it exists. Times are wall-clock seconds."""

    number: int
    base: str
    started: float
    ended: float | None = None
    outcome: str | None = None
    """`built`, `no_change`, `interrupted`, or the failure's class; None while it runs."""
    reason: str | None = None
    branch: str | None = None
    """The branch in the trusted repository that holds what the attempt left, if it left anything."""


class Intent(_Document):
    """The landing that is under way: the target is about to move from `old` (None: it does not exist) to `new`."""

    old: str | None
    new: str
    recorded: float


class TaskDocument(_Document):
    """The state of one task in one run."""

    status: TaskStatus = TaskStatus.PENDING
    attempts: tuple[Attempt, ...] = ()
    failures: int = 0
    """Attempts that ended in failure; those that were cut off by our own end do not count."""
    commit: str | None = None
    """What waits to land: the commit of the attempt that was built."""
    intent: Intent | None = None
    landed: str | None = None
    """The commit on the target's first-parent line that brought the task in."""
    branch: str | None = None
    reason: str | None = None
    paths: tuple[str, ...] = ()
    """The paths in conflict."""

    @property
    def attempt(self) -> Attempt:
        """The newest attempt."""
        return self.attempts[-1]

    def with_attempt(self, **changes: Any) -> tuple[Attempt, ...]:
        """Return the attempts with the newest one changed."""
        return (*self.attempts[:-1], self.attempt.model_copy(update=changes))


class RunDocument(_Document):
    """One execution of a config; enough to resume it without the file that it came from."""

    id: str
    config: str
    """The path of the file that it was started from."""
    repo: str
    is_url: bool
    base: str
    target: str
    capacity: int
    adapters: dict[str, dict[str, Any]]
    """By name: `use` and the adapter's own options."""
    tasks: tuple[str, ...]
    """Task ids in the file's order."""
    start: str
    """The commit that the target (or, where it did not exist, the base) was at: landings are looked for behind it."""
    hub: str
    """The folder of the hub and the trusted repository."""
    started: float
    ended: float | None = None
