"""The comment that shows the state of a task on its issue. Pure.

People read its text. A hidden block at its end has the same state for other runs of `council`: who works on the task,
since when, and the digest of the visible part, so that an unchanged state causes no write.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Final

from orchestrator.protocols import TrackedState

_MARK: Final = "<!-- council:state"
_BLOCK: Final = re.compile(re.escape(_MARK) + r"\s*(\{.*?\})\s*-->", re.DOTALL)
_LONGEST_REASON: Final = 500
#: The label of a status begins with it; people's labels `council:ignore` and `council:retry` do too.
LABEL_PREFIX: Final = "council:"
#: The labels of statuses, by status; other statuses have none.
_LABELS: Final = {
    "pending": "council:pending",
    "running": "council:running",
    "queued": "council:landing",
    "checking": "council:landing",
    "landing": "council:landing",
    "awaiting_approval": "council:approval",
    "landed": "council:landed",
    "done": "council:landed",
    "no_change": "council:no-change",
    "conflict": "council:conflict",
    "failed": "council:failed",
    "cancelled": "council:cancelled",
    "blocked": "council:blocked",
}
STATUS_LABELS: Final = frozenset(_LABELS.values())


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
        """Return True if its owner was alive less than `stale_after` seconds ago."""
        return not self.has_ended and self.heartbeat is not None and now - self.heartbeat < stale_after


def status_label(state: TrackedState) -> str | None:
    """Return the label of a task's status."""
    return _LABELS.get(str(state.task["status"]))


def is_state_comment(body: str) -> bool:
    """Return True if a comment shows the state of a task."""
    return _MARK in body


def read_state(body: str) -> SharedState | None:
    """Return the hidden block of a comment; None if there is none, or it is damaged."""
    blocks = _BLOCK.findall(body)
    try:
        values = json.loads(blocks[-1]) if blocks else None
        return None if values is None else SharedState(**{name: values[name] for name in SharedState.__slots__})
    except (ValueError, KeyError, TypeError):
        return None


def write_comment(state: TrackedState, heartbeat: float | None) -> str:
    """Return the comment for a state; `heartbeat` is the time of the owner's last sign of life."""
    text = _text(state)
    task = state.task
    block = {
        "run": state.run,
        "task": state.id,
        "status": task["status"],
        "owner": state.owner,
        "heartbeat": heartbeat,
        "attempt": task.get("attempts", 0),
        "epoch": state.epoch,
        "retries": state.retries,
        "has_ended": state.has_ended,
        "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    return f"{text}\n\n{_MARK}\n{json.dumps(block, sort_keys=True)}\n-->"


def _text(state: TrackedState) -> str:
    task = state.task
    cost = task.get("cost")
    rows = {
        "run": f"`{state.run}`",
        "attempt": task.get("attempts") or None,
        "owner": state.owner,
        "branch": None if task.get("branch") is None else f"`{task['branch']}`",
        "landed": None if task.get("landed") is None else f"`{task['landed']}`",
        "cost": None if cost is None else f"${cost:.2f}",
        "reason": None if task.get("reason") is None else _quote(str(task["reason"])),
        "next": _next_step(state),
    }
    lines = [f"**council: {state.label}**", ""]
    lines += [f"- {name}: {value}" for name, value in rows.items() if value is not None]
    return "\n".join(lines)


def _quote(text: str) -> str:
    """Return text of an agent in one line, without references, commands or hidden blocks."""
    short = " ".join(text.split())[:_LONGEST_REASON]
    return f"`{short.replace('`', chr(39))}`"


def _next_step(state: TrackedState) -> str | None:
    match state.task["status"]:
        case "awaiting_approval":
            return "comment `/council approve` or `/council reject REASON`"
        case "failed" | "conflict" | "cancelled" | "no_change":
            return "comment `/council retry`, or set the label `council:retry`"
        case _:
            return None


def needs_write(found: str | None, new: str, *, now: float, refresh: float) -> bool:
    """Return True if a comment has to be written: it is missing, outdated, or its heartbeat is older than `refresh`."""
    before, after = (None if found is None else read_state(found)), read_state(new)
    if before is None or after is None:
        return True
    if replace(before, heartbeat=None) != replace(after, heartbeat=None):
        return True
    return not after.has_ended and after.heartbeat is not None and now - (before.heartbeat or 0.0) > refresh
