"""Recordings of programs (their output and exit), with which adapters are tested."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.protocols import SessionEnd

RECORDING_TIME = 1_790_000_000.0
"""The end of every recording in wall-clock seconds; recorded times are relative to it."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One run of a program: its name and version, its exit code or signal, and its output lines."""

    program: str
    exit: int | None
    signal: int | None
    stdout: list[str]
    stderr: list[str]

    def end(self) -> SessionEnd:
        """Return the end as an adapter gets it, without parsed events."""
        return SessionEnd(self.exit, self.signal, RECORDING_TIME, _text(self.stdout), _text(self.stderr))

    def write(self, path: Path) -> None:
        """Write it as a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def read_recordings(folder: Path) -> dict[str, Recording]:
    """Return the recordings of a folder by name: the file name without `.json`."""
    return {path.stem: Recording(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))}


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
