"""The comment that shows the state of a task on its issue. Pure.

People read its text. A hidden block at its end has the same state for other runs of `council`: who works on the task,
since when, and the digest of the visible part, so that an unchanged state causes no write.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Final

from orchestrator.domain.runs.statuses import RETRYABLE_STATUSES, USER_STATUSES, TaskStatus
from orchestrator.protocols import TrackedState

_MARK: Final = "<!-- council:state"
_BEGIN: Final = "**council: "
_END: Final = "-->"
_LONGEST_REASON: Final = 500
_BLOCKED: Final = "blocked"


@dataclass(frozen=True, slots=True)
class SharedState:
    """The hidden block of a comment."""

    run: str
    task: str
    status: str
    owner: str | None
    heartbeat: float | None
    attempt: int
    epoch: int
    retries: int
    has_ended: bool
    digest: str

    def is_claimed(self, now: float, stale_after: float) -> bool:
        """Return True if its owner was alive less than `stale_after` seconds ago; clocks may differ by as much."""
        return not self.has_ended and self.heartbeat is not None and abs(now - self.heartbeat) < stale_after


def status_label(status: str) -> str:
    """Return the label of a task's status; all statuses of landing have the same, because they change quickly."""
    is_landing = status != _BLOCKED and TaskStatus(status).record.is_landing
    return f"council:{TaskStatus.LANDING if is_landing else status.replace('_', '-')}"


STATUS_LABELS: Final = frozenset(status_label(status) for status in (*TaskStatus, _BLOCKED))


def is_state_comment(body: str) -> bool:
    """Return True if a comment shows the state of a task; one that only quotes such a comment does not."""
    return body.startswith(_BEGIN) and _MARK in body and body.rstrip().endswith(_END)


def read_state(body: str) -> SharedState | None:
    """Return the hidden block of a comment; None if there is none, or it is damaged."""
    if not is_state_comment(body):
        return None
    try:
        values = json.loads(body.rpartition(_MARK)[2].rstrip().removesuffix(_END))
        return SharedState(**{name: values[name] for name in SharedState.__slots__})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def to_shared(state: TrackedState, now: float) -> SharedState:
    """Return the hidden block for a state; `now` is the time of a sign of life of its run (wall-clock seconds)."""
    return SharedState(
        run=state.run,
        task=state.id,
        status=state.task["status"],
        owner=state.owner,
        heartbeat=None if state.has_ended else now,
        attempt=state.task.get("attempts", 0),
        epoch=state.epoch,
        retries=state.retries,
        has_ended=state.has_ended,
        digest=hashlib.sha256(describe(state).encode()).hexdigest()[:16],
    )


def write_comment(text: str, shared: SharedState) -> str:
    """Return a comment with a visible text and a hidden block."""
    return f"{text}\n\n{_MARK}\n{json.dumps(asdict(shared), sort_keys=True)}\n-->"


def describe(state: TrackedState) -> str:
    """Return the visible text of the comment for a state."""
    task = state.task
    cost = task.get("cost")
    rows = {
        "run": f"`{state.run}`",
        "attempt": task.get("attempts") or None,
        "owner": state.owner,
        "branch": None if task.get("branch") is None else f"`{task['branch']}`",
        "landed": None if task.get("landed") is None else f"`{task['landed']}` on `{state.target}`",
        "cost": None if cost is None else f"${cost:.2f}",
        "reason": None if task.get("reason") is None else _quote(str(task["reason"])),
        "next": _next_step(state),
    }
    lines = [f"{_BEGIN}{state.label}**", ""]
    lines += [f"- {name}: {value}" for name, value in rows.items() if value is not None]
    return "\n".join(lines)


def _quote(text: str) -> str:
    """Return text of an agent in one line, without references, commands or hidden blocks."""
    short = " ".join(text.split())[:_LONGEST_REASON]
    return f"`{short.replace('`', chr(39)).replace('<!--', '<! --')}`"


def _next_step(state: TrackedState) -> str | None:
    status = state.task["status"]
    if status == TaskStatus.PROPOSED:
        return "review and merge the pull request, or close it"
    if status in USER_STATUSES:
        return "comment `/council approve` or `/council reject REASON`"
    if status in RETRYABLE_STATUSES:
        return "comment `/council retry`, or set the label `council:retry`"
    return None if state.next_command is None else f"`{state.next_command}`"


def is_outdated(shown: SharedState | None, new: SharedState, refresh: float) -> bool:
    """Return True if a comment has to be written: none is shown, it differs, or its heartbeat is older than `refresh`.

    `refresh` is in seconds.
    """
    if shown is None or replace(shown, heartbeat=None) != replace(new, heartbeat=None):
        return True
    return new.heartbeat is not None and new.heartbeat - (shown.heartbeat or 0.0) > refresh
