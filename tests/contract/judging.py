"""Ends of programs as they were seen, and what an adapter says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from orchestrator.domain.runs.outcome import Failed
from orchestrator.protocols import AdapterType, SessionEnd

#: What was recorded by running programs, in a folder for each.
TRANSCRIPTS: Final = Path(__file__).parents[1] / "transcripts"
#: An id as programs give to their conversations.
SESSION: Final = "e4176175-ef9d-4a2f-bffa-f270f179ef19"


def end(stdout: str, code: int | None = 1, stderr: str = "") -> SessionEnd:
    """Return the end of a program that printed this."""
    return SessionEnd(exit=code, signal=None, time=1_790_000_000.0, stdout=stdout, stderr=stderr)


def judged(adapter_type: AdapterType, options: dict[str, Any], stdout: str) -> Failed | None:
    """Return the verdict of an adapter with these options on an end."""
    adapter = adapter_type(adapter_type.Options.model_validate(options))
    events = [event for line in stdout.splitlines() for event in adapter.parse(line)]
    return adapter.verdict(SessionEnd(1, None, 1_790_000_000.0, stdout, "", events))
