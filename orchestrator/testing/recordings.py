"""Recordings of programs (output and exit) for testing adapters."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.protocols import SessionEnd

RECORDING_TIME = 1_790_000_000.0
"""The end of every recording in wall-clock seconds, to which recorded times are relative."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One run of a program: name, version, exit code or signal, and output lines."""

    program: str
    exit: int | None
    signal: int | None
    stdout: list[str]
    stderr: list[str]

    def end(self) -> SessionEnd:
        """Return the end as passed to an adapter, without parsed events."""
        return SessionEnd(self.exit, self.signal, RECORDING_TIME, _text(self.stdout), _text(self.stderr))

    def write(self, path: Path) -> None:
        """Write the recording to a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def read_recordings(folder: Path) -> dict[str, Recording]:
    """Return the recordings in a folder, keyed by file name without `.json`."""
    return {path.stem: Recording(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))}


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
