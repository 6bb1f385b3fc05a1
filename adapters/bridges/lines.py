"""The output of bridges: one JSON object per line, with a `type` and its fields."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from types import UnionType
from typing import Any, Final

#: The fields of each line type with their types. `adapters.json_output` parses lines with the same table.
LINE_FIELDS: Final[Mapping[str, Mapping[str, type | UnionType]]] = {
    "message": {"text": str},  # the agent's message, in complete lines
    "planned": {"text": str},  # the agent's steps, in the format of `AgentPlan`
    # `diff`: the changed lines of an edit.
    "tool": {"name": str, "detail": str, "paths": list, "call": str | None, "diff": str | None},
    # The reason for a failure on one line, or None on success, and what the tool returned.
    "tool_ended": {"call": str, "failed": str | None, "output": str | None},
    "spent": {"input_tokens": int, "output_tokens": int, "cost": float | int | None},  # in total, US dollars
    "session": {"id": str},  # the agent's id of the conversation
    "warned": {"text": str},
    "denied": {"tool": str, "detail": str, "call": str},
    "concluded": {"text": str, "failure": str | None, "reason": str},  # the failure class, or None on success
    "alive": {},  # prevents an idle timeout in a silent session
}

#: The detail of a denied tool that another mode of the adapter would allow.
DENIED_BY_MODE: Final = "its adapter allows only edits"
_ALIVE_EVERY: Final = 10.0  # seconds
#: Maximum characters in a field, and entries in a list. Longer ones are truncated to keep lines readable.
MAX_FIELD_CHARS: Final = 50_000
_MAX_ENTRIES: Final = 100


def write_line(type_: str, **fields: Any) -> None:
    """Print a line. Raises KeyError or TypeError if it does not conform to the table."""
    if fields.keys() != LINE_FIELDS[type_].keys():
        raise TypeError(f"a line of type {type_!r} has the fields {', '.join(LINE_FIELDS[type_])}")
    sys.stdout.write(json.dumps({"type": type_, **{name: _cut(value) for name, value in fields.items()}}) + "\n")
    sys.stdout.flush()


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value[:MAX_FIELD_CHARS]
    return [str(entry)[:500] for entry in value[:_MAX_ENTRIES]] if isinstance(value, list) else value


class MessageBuffer:
    """A streamed message, printed line by line as lines are completed."""

    def __init__(self) -> None:
        self._rest = ""
        self._shown = time.monotonic()
        self._pieces: list[str] = []

    def add(self, piece: str) -> None:
        """Add the next piece."""
        self._pieces.append(piece)
        lines, newline, rest = (self._rest + piece).rpartition("\n")
        self._rest = rest
        if newline:
            self._print(lines)
        self.write_keepalive()

    def flush(self) -> str:
        """Print the incomplete last line; return everything since the last flush."""
        rest, self._rest = self._rest, ""
        self._print(rest)
        text, self._pieces = "".join(self._pieces), []
        return text

    def write_keepalive(self) -> None:
        """Print a keepalive periodically to prevent an idle timeout."""
        if time.monotonic() - self._shown >= _ALIVE_EVERY:
            self._shown = time.monotonic()
            write_line("alive")

    def _print(self, text: str) -> None:
        for start in range(0, len(text), MAX_FIELD_CHARS):
            part = text[start : start + MAX_FIELD_CHARS]
            if part.strip():
                self._shown = time.monotonic()
                write_line("message", text=part)


class BridgeExit(Exception):
    """Ends a bridge with a message and a failure class (None on success).

    Classes are the names of those in `orchestrator.domain.settings.failures`.
    """

    def __init__(self, text: str, failure: str | None = None) -> None:
        super().__init__(text)
        self.failure = failure

    def report(self, *, plain: bool = False) -> int:
        """Print the message, as plain text if `plain`; return the matching exit code."""
        text = str(self)
        if plain:
            sys.stdout.write(f"{text}\n")
            return 1 if self.failure else 0
        write_line("concluded", text=text, failure=self.failure, reason=text if self.failure else "")
        return 1 if self.failure else 0
