"""What a session said and did, entry by entry, from the lines that its program prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from orchestrator.domain.runs.outcome import Failed
from orchestrator.protocols import (
    Adapter,
    AgentMessage,
    CliWarning,
    FinalResult,
    SessionEvent,
    ToolCall,
    ToolDenied,
    ToolResult,
)
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, MAX_LINE_BYTES, MAX_MESSAGE_CHARS

#: JSON lines without a meaning that are held back: if a file begins with so many, its adapter does not know its form.
_MOST_UNKNOWN: Final = 20


class OutputEntryKind(StrEnum):
    """What an entry is."""

    LINE = "line"  #: a line, as it was printed
    TEXT = "text"  #: the agent's words
    TOOL = "tool"  #: a tool call
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class OutputEntry:
    """One entry of a session's log. Of a tool call, `text` is the main argument."""

    kind: OutputEntryKind
    text: str
    tool: str | None = None
    """The name of the tool."""
    outcome: str | None = None
    """How the tool call ended: `ok`, `denied` or `failed: REASON`; None while that is not known."""

    @property
    def line(self) -> str:
        """The entry in words; the agent's words may have several lines."""
        match self.kind:
            case OutputEntryKind.TOOL:
                call = " ".join(filter(None, (self.tool, self.text)))
                return f"> {call}{f': {self.outcome}' if self.outcome else ''}"
            case OutputEntryKind.WARNING:
                return f"! {self.text}"
            case OutputEntryKind.ERROR:
                return f"error: {self.text}"
            case _:
                return self.text


class OutputEntryBuilder:
    """Makes entries of what one session prints, in the order in which it is printed.

    A tool call is held back until its outcome is known, or until something else is said.
    """

    def __init__(self) -> None:
        self.transcript = EMPTY_TRANSCRIPT
        self._unknown: list[str] | None = []
        """The first lines of JSON, as long as none of the file meant anything; None: one did."""
        self._part = ""
        self._spoken = ""
        """The agent's last words, without line breaks."""
        self._failed: Failed | None = None
        """The failure that it concluded with last: some conclude twice."""
        self._calls: dict[str, OutputEntry] = {}
        """The tool calls that have not ended."""
        self._denied: set[str] = set()
        """The tool calls that were denied: some programs report that twice."""
        self._shown: dict[str, OutputEntry] = {}
        """Those of them that were not held back any longer."""

    def read(self, adapter: Adapter, line: str) -> list[OutputEntry]:
        """Return the entries of a line of standard output; one that is no JSON object, or only said, is an entry."""
        if len(line) > MAX_LINE_BYTES:
            return [*self.pause(), OutputEntry(OutputEntryKind.LINE, f"[a line of {len(line)} characters is left out]")]
        events: list[SessionEvent] = []
        with suppress(Exception):  # a mistake of a plugin's must not end what only looks
            events += adapter.parse(line)
        if not line.startswith("{") or events == [AgentMessage(line)]:
            for event in events:
                self.transcript = self.transcript.after(event)
            return [*self.pause(), OutputEntry(OutputEntryKind.LINE, line)]
        if events:
            self._unknown = None
            return list(self.take(events))
        return self._without_meaning(line)

    def take(self, events: Iterable[SessionEvent]) -> Iterator[OutputEntry]:
        """Yield the entries of events."""
        for event in events:
            self.transcript = self.transcript.after(event)
            yield from self._take(event)

    def pause(self) -> list[OutputEntry]:
        """Return what was held back: nothing follows for now, or something that must not come before it."""
        held = [*self._words(), *self._calls.values()]
        self._shown |= self._calls
        self._calls = {}
        return held

    def end(self) -> list[OutputEntry]:
        """Return what was held back: nothing follows."""
        lines = [OutputEntry(OutputEntryKind.LINE, line) for line in self._unknown or ()]
        self._unknown = None if self._unknown is None else []
        return [*lines, *self.pause()]

    def _without_meaning(self, line: str) -> list[OutputEntry]:
        if self._unknown is None:
            return []
        self._unknown.append(line)
        return self.end() if len(self._unknown) >= _MOST_UNKNOWN else []

    def _take(self, event: SessionEvent) -> Iterator[OutputEntry]:
        match event:
            case AgentMessage(text, part=True):
                self._part += text
            case AgentMessage(text):
                yield from self.pause()
                yield from self._said(text)
            case ToolCall():
                yield from self._words()
                yield from self._began(event)
            case ToolResult(call, failed):
                yield from self._ended(call, failed)
            case ToolDenied() | CliWarning():
                yield from self._warning(event)
            case FinalResult(text, failed):
                yield from self.pause()
                yield from self._said(text if failed is None else "")
                yield from self._failure(failed)
            case _:
                pass

    def _began(self, used: ToolCall) -> Iterator[OutputEntry]:
        entry = OutputEntry(OutputEntryKind.TOOL, used.detail, used.name)
        if used.call is None:
            yield entry
        elif used.call not in self._shown:
            known = self._calls.get(used.call, entry)
            self._calls[used.call] = replace(known, text=used.detail or known.text)

    def _warning(self, event: ToolDenied | CliWarning) -> Iterator[OutputEntry]:
        if isinstance(event, CliWarning):
            yield OutputEntry(OutputEntryKind.WARNING, event.text)
        elif event.call is None or event.call not in self._denied:
            self._denied.add(event.call or "")
            held = self._calls.pop(event.call or "", None)
            yield (
                replace(held, outcome="denied")
                if held
                else OutputEntry(OutputEntryKind.WARNING, f"denied: {event.text}")
            )

    def _failure(self, failed: Failed | None) -> Iterator[OutputEntry]:
        if failed is not None and failed != self._failed:
            yield OutputEntry(OutputEntryKind.ERROR, f"{failed.failure}: {failed.reason}")
        self._failed = failed

    def _ended(self, call: str, failed: str | None) -> Iterator[OutputEntry]:
        held = self._calls.pop(call, None)
        entry = held or self._shown.pop(call, None)
        if entry is not None and (held is not None or failed is not None):
            yield replace(entry, outcome="ok" if failed is None else f"failed: {failed}".removesuffix(": "))

    def _words(self) -> Iterator[OutputEntry]:
        part, self._part = self._part, ""
        yield from self._said(part)

    def _said(self, text: str) -> Iterator[OutputEntry]:
        """Yield words, unless they repeat the last ones, as a result does."""
        words = " ".join(text.split())
        if words and words[-MAX_MESSAGE_CHARS:] not in self._spoken:
            self._spoken = f"{self._spoken} {words}"[-2 * MAX_MESSAGE_CHARS :]
            yield OutputEntry(OutputEntryKind.TEXT, text.strip("\n"))
