"""How much state sessions may write: a rate and a total for each session, and a total for the sessions of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.errors import RefusedError
from orchestrator.system.clock import Clock

#: Bytes that every request counts for, beside its own: a line of the log has a head, and a commit its cost.
OVERHEAD: Final = 4096
#: Bytes that a session can write at once, and how many a second it may write again.
BURST, RATE = 4 << 20, 64 << 10
#: Bytes that a session can write in all, and all sessions of a run in one process.
MAX_SESSION_BYTES, MAX_RUN_BYTES = 32 << 20, 256 << 20

_REMEDY: Final = "write large results to files of the repository, and share their paths"


@dataclass(slots=True)
class _Account:
    room: float
    at: float
    """When there was so much room, by the monotonic clock."""
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
        """Count a request that writes `size` bytes; RefusedError where a limit does not allow it, nothing counted."""
        limits, now, size = self.limits, self.clock.monotonic(), size + OVERHEAD
        account = self._sessions.setdefault(session, _Account(limits["burst"], now))
        account.room = min(limits["burst"], account.room + limits["rate"] * (now - account.at))
        account.at = now
        if account.total + size > limits["session"]:
            raise RefusedError(f"this session has written {_mib(limits['session'])} of state, all that it may", _REMEDY)
        if self._runs.get(session.run, 0) + size > limits["run"]:
            what = f"the sessions of run {session.run} have written {_mib(limits['run'])} of state, all that they may"
            raise RefusedError(what, _REMEDY)
        if size > account.room:
            seconds = max(1, round((size - account.room) / limits["rate"]))
            what = f"this session writes more state than {limits['rate'] >> 10} KiB a second allow"
            raise RefusedError(what, f"ask again in {seconds} s, and write less at once")
        account.room -= size
        account.total += size
        self._runs[session.run] = self._runs.get(session.run, 0) + size

    def close(self, session: SessionName) -> None:
        """Forget a session that has ended; what it wrote still counts for its run."""
        self._sessions.pop(session, None)


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
