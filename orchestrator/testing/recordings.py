"""What a program printed and how it ended, recorded once and kept: adapters are tested with it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.protocols import SessionEnd

RECORDING_TIME = 1_790_000_000.0
"""When each of them ended, in wall-clock seconds: what a program says of the time is recorded as of then."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One run of a program: which it was, with its version; its exit code or signal; the lines that it printed."""

    program: str
    exit: int | None
    signal: int | None
    stdout: list[str]
    stderr: list[str]

    def end(self) -> SessionEnd:
        """Return it as an adapter gets to see it; no line is parsed yet."""
        return SessionEnd(self.exit, self.signal, RECORDING_TIME, _text(self.stdout), _text(self.stderr))

    def write(self, path: Path) -> None:
        """Keep it as a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def read_recordings(folder: Path) -> dict[str, Recording]:
    """Return the recordings of a folder by name, which is the file's without `.json`."""
    return {path.stem: Recording(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))}


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
