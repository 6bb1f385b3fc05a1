"""Recorded exits of programs, and their classification by an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from orchestrator.domain.runs.outcome import Failed
from orchestrator.protocols import AdapterType, SessionEnd

#: Recordings of real programs, one folder each.
TRANSCRIPTS: Final = Path(__file__).parents[1] / "transcripts"
#: A conversation id as programs print it.
SESSION: Final = "e4176175-ef9d-4a2f-bffa-f270f179ef19"


def end(stdout: str, code: int | None = 1, stderr: str = "") -> SessionEnd:
    """Return the exit of a program with this output."""
    return SessionEnd(exit=code, signal=None, time=1_790_000_000.0, stdout=stdout, stderr=stderr)


def get_verdict(adapter_type: AdapterType, options: dict[str, Any], stdout: str) -> Failed | None:
    """Return the conclusion of an adapter with these options."""
    adapter = adapter_type(adapter_type.Options.model_validate(options))
    events = [event for line in stdout.splitlines() for event in adapter.parse(line)]
    return adapter.verdict(SessionEnd(1, None, 1_790_000_000.0, stdout, "", events))
