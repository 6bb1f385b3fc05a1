"""The command that shows the log of a task: the output of its sessions and checks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict

import click

from orchestrator.api.topics.logs import AttemptMarker, LogChunk, LogEntry, LogSelection
from orchestrator.cli.core.command import CouncilContext, council_command, run_option
from orchestrator.cli.core.completion import complete_tasks
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.session_log import LogFormatter
from orchestrator.protocols import JsonObject


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
