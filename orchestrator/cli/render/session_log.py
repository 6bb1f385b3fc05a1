"""The log of a session as lines of text with styles."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from orchestrator.api.topics.logs import AttemptMarker, LogEntry
from orchestrator.cli.render.text import format_count, format_elapsed, one_line, printable, truncate_end
from orchestrator.domain.wording import format_cost
from orchestrator.sessions.output.entries import OutputEntry, OutputEntryKind
from orchestrator.system.clock import format_local_time

#: The maximum and minimum width of lines in terminal cells.
_WIDEST, _NARROWEST = 100, 40
#: The maximum number of shown lines of an edit and of a tool's output.
_MAX_CHANGED, _MAX_RETURNED = 40, 12
_INDENT: Final = "    "
#: Sequences by which programs set colours and move the cursor (ECMA-48, and titles of windows).
_CONTROL: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
#: Styles are ECMA-48 SGR parameters.
_BOLD, _DIM, _RED, _GREEN, _YELLOW, _CYAN = "1", "2", "31", "32", "33", "36"
_CHANGED: Final = {"+": _GREEN, "-": _RED}
_STYLES: Final = {OutputEntryKind.WARNING: _YELLOW, OutputEntryKind.ERROR: _RED, OutputEntryKind.PLAN: _CYAN}

StyledLine = tuple[str, str]


class LogFormatter:
    """A formatter of log entries as lines of text, each with a style."""

    def __init__(self) -> None:
        self._stream = ""
        self._in_code = False
        """Whether the last line of the agent's messages is in a block of code."""
        columns = shutil.get_terminal_size().columns
        self._width = max(min(columns, _WIDEST), _NARROWEST)

    def lines(self, one: LogEntry | AttemptMarker) -> Iterator[StyledLine]:
        """Yield the lines of an entry, or of the start or end of an attempt."""
        if isinstance(one, AttemptMarker):
            yield printable(_attempt_line(one)), _BOLD
            return
        if one.stream != self._stream and one.stream.startswith(("before", "after", "check")):
            yield f"{one.stream.rstrip('0123456789')} {one.stream.lstrip('abcdefghijklmnopqrstuvwxyz')}:", _BOLD
        self._stream = one.stream
        self._in_code &= one.kind is OutputEntryKind.TEXT
        match one.kind:
            case OutputEntryKind.LINE:
                yield one.text, ""  # control characters are replaced when it is printed
            case OutputEntryKind.TEXT:
                yield from ((line, "") for line in self._wrapped(printable(one.text, keep="\n\t")))
            case OutputEntryKind.TOOL:
                yield printable(self._tool(one)), _style_of_outcome(one.outcome)
                yield from self._block(one.diff, _MAX_CHANGED, is_diff=True)
                yield from self._block(one.output, _MAX_RETURNED)
            case kind:
                lines = (one.text if kind is OutputEntryKind.PLAN else one.line).split("\n")
                yield from ((printable(line), _STYLES[kind]) for line in lines)

    def _wrapped(self, text: str) -> Iterator[str]:
        """Yield the lines of a message, wrapped between words, but not those of tables and code."""
        for line in text.split("\n"):
            start = line.lstrip()
            self._in_code ^= start.startswith("```")
            if self._in_code or start.startswith(("|", "```")):
                yield line
                continue
            indent = line[: len(line) - len(start)]
            yield from textwrap.wrap(
                line, self._width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            ) or [""]

    def _tool(self, one: LogEntry) -> str:
        """Return a tool call as one line, with its argument shortened to the width."""
        bare = OutputEntry(one.kind, "", one.tool, one.outcome)
        room = max(self._width - len(bare.line) - 1, _NARROWEST)
        return OutputEntry(one.kind, truncate_end(one.text, room), one.tool, one.outcome).line

    def _block(self, text: str, most: int, *, is_diff: bool = False) -> Iterator[StyledLine]:
        """Yield lines of an edit or of a tool's output, indented and shortened to the width."""
        lines = _CONTROL.sub("", text.replace("\r\n", "\n")).strip("\n").split("\n") if text.strip() else []
        for line in _middle_omitted(lines, most):
            shown = truncate_end(printable(line.expandtabs(4).rstrip()), self._width - len(_INDENT))
            yield f"{_INDENT}{shown}".rstrip(), (_CHANGED.get(line[:1], _DIM) if is_diff else _DIM)


def _middle_omitted(lines: Sequence[str], most: int) -> Sequence[str]:
    omitted = len(lines) - most
    if omitted <= 1:
        return lines
    half = most // 2
    return [*lines[:half], f"… {omitted} more lines", *lines[-half:]]


def _style_of_outcome(outcome: str | None) -> str:
    if outcome is None or outcome == "ok":
        return _CYAN
    return _YELLOW if outcome == "denied" else _RED


def _attempt_line(one: AttemptMarker) -> str:
    attempt = one.attempt
    if one.event == "began":
        phase = "" if attempt.phase is None else f", phase {attempt.phase}"
        return f"session {attempt.number}{phase}, {attempt.adapter}, started {format_local_time(attempt.started)}"
    if attempt.ended is None:
        parts, used = [str(one.event)], one.used
        spent = (used.input_tokens, used.output_tokens, used.cost)
    else:
        outcome = (attempt.outcome or "no outcome").replace("_", " ")
        reason = one_line(attempt.reason) if attempt.reason else ""
        if reason and not reason.startswith(outcome):
            reason = f"{outcome}: {reason}"
        parts = [f"ended after {format_elapsed(attempt.duration(attempt.started))}: {reason or outcome}"]
        spent = (attempt.input_tokens, attempt.output_tokens, attempt.cost)
    sent, received, cost = spent
    if sent or received:
        parts.append(f"{format_count(sent)} tokens in, {format_count(received)} out")
    if cost is not None:
        parts.append(format_cost(cost))
    return f"session {attempt.number} {', '.join(parts)}"
