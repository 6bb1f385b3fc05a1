"""Limit the state that sessions write, by rate and total, per session and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.errors import RefusedError
from orchestrator.system.clock import Clock

#: Bytes charged for each request in addition to its size, for the header of a log line and the cost of a commit.
OVERHEAD: Final = 4096
#: The burst size of a session in bytes, and its sustained rate in bytes per second.
BURST, RATE = 4 << 20, 64 << 10
#: The total size in bytes that a session may write, and all sessions of a run in one process.
MAX_SESSION_BYTES, MAX_RUN_BYTES = 32 << 20, 256 << 20

_REMEDY: Final = "write large results to files in the repository, and share their paths"


@dataclass(slots=True)
class _Account:
    available: float
    """Bytes available now, as of `updated`."""
    updated: float
    """By the monotonic clock."""
    total: int = 0


@dataclass(slots=True)
class WriteQuota:
    """Counts what the sessions of one process write."""

    clock: Clock
    limits: Mapping[str, int] = field(
        default_factory=lambda: {"burst": BURST, "rate": RATE, "session": MAX_SESSION_BYTES, "run": MAX_RUN_BYTES}
    )
    _sessions: dict[SessionName, _Account] = field(default_factory=dict)
    _runs: dict[str, int] = field(default_factory=dict)

    def charge(self, session: SessionName, size: int) -> None:
        """Count a request of `size` bytes; raise RefusedError, uncounted, above a limit."""
        limits, now, size = self.limits, self.clock.monotonic(), size + OVERHEAD
        account = self._sessions.setdefault(session, _Account(limits["burst"], now))
        account.available = min(limits["burst"], account.available + limits["rate"] * (now - account.updated))
        account.updated = now
        if account.total + size > limits["session"]:
            raise RefusedError(f"this session has reached its limit of {_mib(limits['session'])} of state", _REMEDY)
        if self._runs.get(session.run, 0) + size > limits["run"]:
            message = f"the sessions of run {session.run} have reached their limit of {_mib(limits['run'])} of state"
            raise RefusedError(message, _REMEDY)
        if size > account.available:
            seconds = max(1, round((size - account.available) / limits["rate"]))
            message = f"this session exceeds its rate limit of {limits['rate'] >> 10} KiB of state per second"
            raise RefusedError(message, f"retry in {seconds} s, and write less at once")
        account.available -= size
        account.total += size
        self._runs[session.run] = self._runs.get(session.run, 0) + size

    def close(self, session: SessionName) -> None:
        """Forget an ended session; its bytes still count towards the total of its run."""
        self._sessions.pop(session, None)


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
