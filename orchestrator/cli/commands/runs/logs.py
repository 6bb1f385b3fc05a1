"""The command that shows the log of a task: the output of its sessions and checks."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import asdict

import click

from orchestrator.api.topics.logs import AttemptMarker, LogChunk, LogEntry, LogSelection
from orchestrator.cli.core.command import CouncilContext, council_command, run_option
from orchestrator.cli.core.completion import complete_tasks
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import format_count, format_elapsed, one_line, printable
from orchestrator.protocols import JsonObject
from orchestrator.sessions.output.entries import OutputEntryKind
from orchestrator.system.instants import format_local_time

#: The maximum and minimum width of wrapped lines.
_WIDEST, _NARROWEST = 100, 40


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

    Prints a line for each tool call with its main argument and outcome, messages, warnings and errors, the output of
    checks, and finally the time and cost. Lines that are not JSON are printed unchanged. Everything goes to standard
    output, except that --raw prints the session's standard error to standard error.

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
    shown = _LogFormatter()
    async with aclosing(entries):
        async for one in entries:
            if output.as_json:
                output.json(_json(one))
                continue
            for line in shown.lines(one):
                output.text(f"{line}\n")


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


class _LogFormatter:
    """A formatter of log entries as lines of text."""

    def __init__(self) -> None:
        self._stream = ""
        columns = shutil.get_terminal_size().columns
        self._width = max(min(columns, _WIDEST), _NARROWEST)

    def lines(self, one: LogEntry | AttemptMarker) -> Iterator[str]:
        """Yield the lines of an entry, or of the start or end of an attempt."""
        if isinstance(one, AttemptMarker):
            yield printable(_attempt_line(one))
            return
        if one.stream != self._stream and one.stream.startswith(("before", "after", "check")):
            yield f"{one.stream.rstrip('0123456789')} {one.stream.lstrip('abcdefghijklmnopqrstuvwxyz')}:"
        self._stream = one.stream
        match one.kind:
            case OutputEntryKind.LINE:
                yield one.text  # control characters are replaced when it is printed
            case OutputEntryKind.TEXT:
                for line in printable(one.text, keep="\n\t").split("\n"):
                    yield from self._wrapped(line)
            case OutputEntryKind.TOOL:
                yield printable(self._tool(one))
            case _:
                yield printable(one.line)

    def _wrapped(self, line: str) -> list[str]:
        indent = line[: len(line) - len(line.lstrip())]
        width = self._width
        parts = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        return parts or [""]

    def _tool(self, one: LogEntry) -> str:
        """Return a tool call as one line, with its argument shortened to the width."""
        bare = LogEntry(one.kind, "", one.tool, one.outcome)
        room = max(self._width - len(bare.line) - 1, _NARROWEST)
        text = one.text if len(one.text) <= room else f"{one.text[: room - 1]}…"
        return LogEntry(one.kind, text, one.tool, one.outcome).line


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
        parts.append(f"${cost:.2f}")
    return f"session {attempt.number} {', '.join(parts)}"
