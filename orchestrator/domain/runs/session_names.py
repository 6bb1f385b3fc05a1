"""What a session is called."""

from __future__ import annotations

from typing import NamedTuple


class SessionName(NamedTuple):
    """One attempt at a task of a run, all of whose programs are one session to the others."""

    run: str
    task: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.run}/{self.task}.{self.attempt}"
