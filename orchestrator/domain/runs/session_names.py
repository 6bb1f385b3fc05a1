"""Names of sessions."""

from __future__ import annotations

from typing import NamedTuple


class SessionName(NamedTuple):
    """The name of an attempt; all of its programs count as one session."""

    run: str
    task: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.run}/{self.task}.{self.attempt}"
