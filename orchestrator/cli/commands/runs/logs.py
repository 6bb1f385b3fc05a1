"""The command that shows the log of a task: the output of its sessions and checks."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Final

import click

from orchestrator.api.topics.logs import AttemptMarker, LogChunk, LogEntry, LogSelection
from orchestrator.cli.core.command import CouncilContext, council_command, run_option
from orchestrator.cli.core.completion import complete_tasks
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import format_count, format_elapsed, one_line, printable, truncate_end
from orchestrator.domain.wording import format_cost
from orchestrator.protocols import JsonObject
from orchestrator.sessions.output.entries import OutputEntry, OutputEntryKind
from orchestrator.system.clock import format_local_time


@click.command()
@click.argument("task", shell_complete=complete_tasks)
@click.option("-f", "--follow", is_flag=True, help="Continue with new output until the task has ended.")
@click.option(
    "--session",
    "attempt",
    metavar="N",
    type=click.IntRange(min=1),
    help="Show the session with this number; default: the newest.",
)
@click.option("--phase", metavar="PHASE", help="Show the newest session of this phase.")
@click.option("--raw", is_flag=True, help="Print the original output.")
@run_option
@council_command()
async def logs(
    context: CouncilContext,
    task: str,
    follow: bool,
    attempt: int | None,
    phase: str | None,
    raw: bool,
    run: str | None,
) -> None:
    """Show the log of a task's session.

    Prints each tool call with its main argument, outcome, changed lines and output, the agent's messages and plans,
    warnings and errors, the output of checks, and finally the time and cost. Long changes and outputs are shortened;
    --json has more of them, and --raw everything. Lines that are not JSON are printed unchanged. Everything goes to
    standard output, except that --raw prints the session's standard error to standard error.

    \b
    Examples:
      council logs models
      council logs models --follow
      council logs models --session 1 --raw
      council logs models --phase review
    """
    if attempt is not None and phase is not None:
        raise click.UsageError("--session and --phase cannot be combined: both select a session.")
    logs, selection = context.council.logs, LogSelection(attempt=attempt, phase=phase, follow=follow)
    if raw:
        await _print_raw(context.output, logs.chunks(task, run, **selection))
    else:
        await _print(context.output, logs.entries(task, run, **selection))


async def _print(output: Output, entries: AsyncGenerator[LogEntry | AttemptMarker]) -> None:
    formatter = LogFormatter()
    async with aclosing(entries):
        async for one in entries:
            if output.as_json:
                output.json(_json(one))
                continue
            for line, style in formatter.lines(one):
                output.styled(line, style)


async def _print_raw(output: Output, parts: AsyncGenerator[LogChunk]) -> None:
    async with aclosing(parts):
        async for part in parts:
            if output.as_json:
                output.json(asdict(part))
            else:
                output.text(part.text, err=part.stream == "stderr")


def _json(one: LogEntry | AttemptMarker) -> JsonObject:
    if isinstance(one, LogEntry):
        return asdict(one)
    attempt = one.attempt
    facts: JsonObject = {"attempt": attempt.number, "kind": one.event}
    facts |= {"phase": attempt.phase, "adapter": attempt.adapter}
    if one.event == "began":
        return {**facts, "time": attempt.started}
    used = attempt if one.event == "ended" else one.used
    spent = {key: getattr(used, key) for key in ("input_tokens", "output_tokens", "cached_tokens", "cost")}
    return {**facts, "time": attempt.ended, "outcome": attempt.outcome, "reason": attempt.reason, **spent}


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
        reason = f": {one_line(attempt.reason)}" if attempt.reason else ""
        parts = [f"ended after {format_elapsed(attempt.duration(attempt.started))}: {outcome}{reason}"]
        spent = (attempt.input_tokens, attempt.output_tokens, attempt.cost)
    sent, received, cost = spent
    if sent or received:
        parts.append(f"{format_count(sent)} tokens in, {format_count(received)} out")
    if cost is not None:
        parts.append(format_cost(cost))
    return f"session {attempt.number} {', '.join(parts)}"
