"""Runs whose check waits until the test opens it, and is counted."""

from __future__ import annotations

import signal
from types import TracebackType
from typing import Self

from tests.command_server import StartedCommand
from tests.conftest import CommandResult, Repository

#: Seconds within which a process ends.
LIMIT = 60.0


class GatedChecks:
    """Processes whose check waits for the file `open`; they are killed at the end of the block."""

    def __init__(self, repository: Repository) -> None:
        self.repository, self.folder = repository, repository.spawns.parent
        self.children: list[StartedCommand] = []
        self.command = f"echo x >> {self.folder}/begun; while ! test -e {self.folder}/open; do sleep 0.02; done"
        """The command of the check."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)

    def open(self) -> None:
        """Let all checks end."""
        (self.folder / "open").touch()

    @property
    def checks(self) -> int:
        """Return how many checks have begun."""
        file = self.folder / "begun"
        return len(file.read_text().splitlines()) if file.exists() else 0


def outcome(child: StartedCommand) -> CommandResult:
    """Return the exit code and the output of a process."""
    out, error = child.communicate(timeout=LIMIT)
    return CommandResult(child.wait(), out, error)
