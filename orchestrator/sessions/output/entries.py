"""Log entries of a session, built from the output of its program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from orchestrator.domain.runs.outcome import Failed
from orchestrator.errors import PluginFailed, plugin_code
from orchestrator.protocols import (
    Adapter,
    AgentMessage,
    AgentPlan,
    CliWarning,
    FinalResult,
    SessionEvent,
    ToolCall,
    ToolDenied,
    ToolResult,
)
from orchestrator.sessions.output.transcript import EMPTY_TRANSCRIPT, MAX_LINE_BYTES, MAX_MESSAGE_CHARS

#: The maximum number of leading uninterpreted JSON lines to hold back. If there are more, the adapter does not know the
# format.
_MAX_UNKNOWN: Final = 20


class OutputEntryKind(StrEnum):
    """The kind of an entry."""

    LINE = "line"  #: an output line, unchanged
    TEXT = "text"  #: a message of the agent
    PLAN = "plan"  #: the agent's steps, one per line
    TOOL = "tool"  #: a tool call
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class OutputEntry:
    """One entry of a session's log. For a tool call, `text` is its main argument."""

    kind: OutputEntryKind
    text: str
    tool: str | None = None
    """The name of the tool."""
    outcome: str | None = None
    """The outcome of the tool call: `ok`, `denied` or `failed: REASON`; None while unknown."""
    diff: str = ""
    """The lines that the tool call changes, unless an earlier entry of the call has them."""
    output: str = ""
    """The result of the tool, unless the outcome contains it or the call is an edit that succeeded."""

    @property
    def line(self) -> str:
        """The entry as text; a message of the agent may have several lines."""
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
    """Builds the entries of one session in the order of its output.

    A tool call is held back until its outcome is known or other output follows.
    """

    def __init__(self) -> None:
        self.transcript = EMPTY_TRANSCRIPT
        self._unknown: list[str] | None = []
        """The leading uninterpreted JSON lines; None once a line was interpreted."""
        self._part = ""
        self._spoken = ""
        """The agent's last messages, without line breaks."""
        self._failed: Failed | None = None
        """The last reported failure: some programs report it twice."""
        self._calls: dict[str, OutputEntry] = {}
        """The unfinished tool calls that are held back."""
        self._denied: set[str] = set()
        """The denied tool calls: some programs report a denial twice."""
        self._shown: dict[str, OutputEntry] = {}
        """The unfinished tool calls that were already returned."""
        self._edits: set[str] = set()
        """The unfinished tool calls that change lines."""

    def read(self, adapter: Adapter, line: str) -> list[OutputEntry]:
        """Return the entries of a line of standard output.

        A line that is not a JSON object, or that is itself a message, is one entry.
        """
        if len(line) > MAX_LINE_BYTES:
            return [*self.flush(), OutputEntry(OutputEntryKind.LINE, f"[line of {len(line)} characters omitted]")]
        events: list[SessionEvent] = []
        with suppress(PluginFailed), plugin_code():  # a plugin error must not break a viewer
            events += adapter.parse(line)
        if not line.startswith("{") or events == [AgentMessage(line)]:
            for event in events:
                self.transcript = self.transcript.after(event)
            return [*self.flush(), OutputEntry(OutputEntryKind.LINE, line)]
        if events:
            self._unknown = None
            return list(self.add(events))
        return self._add_unknown(line)

    def add(self, events: Iterable[SessionEvent]) -> Iterator[OutputEntry]:
        """Add events; yield their entries."""
        for event in events:
            self.transcript = self.transcript.after(event)
            yield from self._add(event)

    def flush(self) -> list[OutputEntry]:
        """Return the entries that were held back; call when the output pauses."""
        held = [*self._words(), *self._calls.values()]
        self._shown |= {call: replace(entry, diff="") for call, entry in self._calls.items()}
        self._calls = {}
        return held

    def end(self) -> list[OutputEntry]:
        """Return the entries that are held back at the end of the output."""
        lines = [OutputEntry(OutputEntryKind.LINE, line) for line in self._unknown or ()]
        self._unknown = None if self._unknown is None else []
        return [*lines, *self.flush()]

    def _add_unknown(self, line: str) -> list[OutputEntry]:
        if self._unknown is None:
            return []
        self._unknown.append(line)
        return self.end() if len(self._unknown) >= _MAX_UNKNOWN else []

    def _add(self, event: SessionEvent) -> Iterator[OutputEntry]:
        match event:
            case AgentMessage(text, part=True):
                self._part += text
            case AgentMessage(text):
                yield from self.flush()
                yield from self._said(text)
            case ToolCall():
                yield from self._words()
                yield from self._began(event)
            case AgentPlan(text):
                yield from self.flush()
                yield OutputEntry(OutputEntryKind.PLAN, text.strip("\n"))
            case ToolResult():
                yield from self._ended(event)
            case ToolDenied() | CliWarning():
                yield from self._warning(event)
            case FinalResult(text, failed):
                yield from self.flush()
                yield from self._said(text if failed is None else "")
                yield from self._failure(failed)
            case _:
                pass

    def _began(self, used: ToolCall) -> Iterator[OutputEntry]:
        entry = OutputEntry(OutputEntryKind.TOOL, used.detail, used.name, diff=used.diff)
        if used.call is None:
            yield entry
            return
        calls = self._shown if used.call in self._shown else self._calls
        known = calls.get(used.call, entry)
        self._edits |= {used.call} if used.diff else set()
        calls[used.call] = replace(known, text=used.detail or known.text, diff=used.diff or known.diff)

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

    def _ended(self, result: ToolResult) -> Iterator[OutputEntry]:
        held = self._calls.pop(result.call, None)
        entry = held or self._shown.pop(result.call, None)
        if entry is None:
            return
        failed, words = result.failed, " ".join(result.output.split())
        is_edit = result.call in self._edits
        self._edits.discard(result.call)
        # The output of an edit only repeats the change.
        output = "" if (is_edit if failed is None else words in failed) else result.output
        if held is not None or failed is not None or output or entry.diff:
            outcome = "ok" if failed is None else f"failed: {failed}".removesuffix(": ")
            yield replace(entry, outcome=outcome, output=output)

    def _words(self) -> Iterator[OutputEntry]:
        part, self._part = self._part, ""
        yield from self._said(part)

    def _said(self, text: str) -> Iterator[OutputEntry]:
        """Yield a message unless it repeats the last one, as a final result does."""
        words = " ".join(text.split())
        if words and words[-MAX_MESSAGE_CHARS:] not in self._spoken:
            self._spoken = f"{self._spoken} {words}"[-2 * MAX_MESSAGE_CHARS :]
            yield OutputEntry(OutputEntryKind.TEXT, text.strip("\n"))
