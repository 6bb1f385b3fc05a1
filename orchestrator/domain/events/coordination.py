"""Events of claims, ownership, locks, notes, shared values and worktree slots."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.domain.events.base import RunEvent, Shown, TaskEvent, TypedEvent


class ClaimAcquired(TaskEvent):
    """A task was claimed without an attempt, for example a queued task."""

    type = "claim.acquired"
    sentence = "assigned to worker {owner}"
    shown = Shown.NEVER

    owner: str
    epoch: int


class ClaimReleased(TaskEvent):
    """A claim was released without another change to its task."""

    type = "claim.released"
    sentence = "its claim was released"
    shown = Shown.NEVER

    release: str
    """`complete`, `abandoned` or `failed`."""
    reason: str | None


class ClaimsTakenOver(RunEvent):
    """A process exited; its tasks were taken over."""

    type = "claims.taken_over"
    sentence = "took over {number} from worker {orchestrator} ({reason})"
    sentence_without = ("count", "lost worker {orchestrator} ({reason})")

    orchestrator: str
    """The name of the process that exited."""
    reason: str
    count: int
    tasks: Sequence[str]

    @property
    def number(self) -> str:
        """The number of tasks with the noun."""
        return f"{self.count} task{'' if self.count == 1 else 's'}"


class OwnershipTaken(TaskEvent):
    """A session took ownership of paths."""

    type = "ownership.taken"
    sentence = "owns {patterns}"
    shown = Shown.NEVER

    patterns: Sequence[str]


class OwnershipRefused(TaskEvent):
    """A request for paths was refused, because another session owns one of them."""

    type = "ownership.refused"
    sentence = "cannot own {patterns}: {holder} owns {held_pattern}"
    shown = Shown.NEVER

    patterns: Sequence[str]
    holder: str
    """The session that owns the path."""
    held_pattern: str
    """The overlapping pattern of that session."""


class OwnershipWaiting(TaskEvent):
    """A session waits for paths."""

    type = "ownership.waiting"
    sentence = "waits for {patterns}"
    shown = Shown.NEVER

    patterns: Sequence[str]


class OwnershipReleased(TaskEvent):
    """A session released paths."""

    type = "ownership.released"
    sentence = "released {patterns}"
    shown = Shown.NEVER

    patterns: Sequence[str]


class LockBroken(TypedEvent):
    """A user broke a lock. Has no `run`."""

    type = "lock.broken"
    sentence = "lock {lock} was removed: {reason}"
    shown = Shown.NEVER

    lock: str
    """The name of the lock."""
    layer: str
    """`file`, `ownership` or `merge`."""
    resources: Sequence[str]
    """The file, the paths, or the target."""
    holders: Sequence[str]
    reason: str


class SharedPut(RunEvent):
    """A new or replaced value was shared with the sessions of the run."""

    type = "shared.put"
    sentence = "shared as {key}"

    task: str | None
    """null if no session put the value."""
    attempt: int | None
    key: str


class NoteAdded(TaskEvent):
    """A session left a note for later sessions."""

    type = "note.added"
    sentence = "added note {note} for later sessions"
    shown = Shown.NEVER

    note: str
    """The id of the note."""
    topic: str | None
    paths: Sequence[str]


class NoteDeleted(TypedEvent):
    """A user deleted a note. Has no `run`."""

    type = "note.deleted"
    sentence = "note {note} was deleted"
    shown = Shown.NEVER

    note: str


class ConflictPredicted(TaskEvent):
    """The unfinished changes of a session conflict with those of another running session.

    Recorded for both tasks, and again when the paths change.
    """

    type = "conflict.predicted"
    sentence = "merge conflict with {other} predicted in {paths}"
    shown = Shown.ALWAYS

    other: str
    """The other task."""
    paths: Sequence[str]
    """The conflicting paths, at most 20."""


class ConflictResolved(TaskEvent):
    """The changes of two sessions merge again without conflicts. Recorded for both tasks."""

    type = "conflict.resolved"
    sentence = "no more merge conflict with {other} predicted"
    shown = Shown.ALWAYS

    other: str
    """The other task."""


class SlotSetupStarted(RunEvent):
    """Steps of `setup` started in a new worktree, or because their inputs changed."""

    type = "slot.setup_started"
    sentence = "{slot}: running setup: {commands}"

    slot: str
    """The folder of the worktree slot."""
    commands: Sequence[str]


class SlotSetupFinished(RunEvent):
    """The steps of `setup` succeeded."""

    type = "slot.setup_finished"
    sentence = "{slot}: setup took {seconds:g} s"

    slot: str
    seconds: float


class SlotTeardownFailed(RunEvent):
    """A command of `teardown` failed."""

    type = "slot.teardown_failed"
    sentence = "{slot}: teardown failed: {reason}"

    slot: str
    reason: str


class SlotPortsChanged(RunEvent):
    """A slot got new ports, because another process uses some of the old ones."""

    type = "slot.ports_changed"
    sentence = "{slot}: got new ports, because another process uses {conflicting_ports}"

    slot: str
    conflicting_ports: Sequence[int]
    ports: Sequence[int]
