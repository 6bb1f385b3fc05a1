"""The command that removes leftovers of runs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import click

from orchestrator.api.topics.cleanup import Cleaner, RemovalResult
from orchestrator.cli.core.command import CommandContext, async_command, open_council, store_option
from orchestrator.cli.core.confirm import ask_yes_no, can_prompt, yes_option
from orchestrator.cli.core.options import parse_duration_option
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import pluralize, printable
from orchestrator.domain.runs.leftovers import Leftover, LeftoverKind, LeftoverStatus
from orchestrator.domain.settings.quantities import format_size_short
from orchestrator.errors import RefusedError
from orchestrator.project import council_home, find_project
from orchestrator.system.clock import SystemClock


@click.command()
@click.option("--dry-run", is_flag=True, help="Only list the leftovers.")
@yes_option
@click.option(
    "--preserved",
    is_flag=True,
    help="Also remove worktrees and internal repositories with work that may exist nowhere else.",
)
@click.option(
    "--pool", is_flag=True, help="Also remove idle worktrees of all repositories: the next run then starts slower."
)
@click.option(
    "--logs",
    metavar="AGE",
    callback=parse_duration_option,
    help="Also remove the logs of runs that ended longer than AGE ago.",
)
@click.option(
    "--runs",
    metavar="[AGE]",
    is_flag=False,
    flag_value="7d",
    callback=parse_duration_option,
    help="Also remove the records of runs that ended longer than AGE ago; default: 7d.",
)
@click.option("--interrupted", is_flag=True, help="With --runs, also remove those of interrupted runs.")
@store_option
@async_command()
async def clean(
    context: CommandContext,
    dry_run: bool,
    yes: bool,
    preserved: bool,
    pool: bool,
    logs: float | None,
    runs: float | None,
    interrupted: bool,
) -> int:
    """Remove leftovers of runs that nothing needs.

    Removes worktrees of ended tasks, temporary files of killed commands, and internal repositories of deleted user
    repositories. Keeps everything that an active run uses or that `council resume` needs, and unmerged work on
    branches: `council salvage list` lists it and `council salvage drop` deletes it.

    --runs removes the records and logs of old runs. A run with unmerged work is removed only with --preserved, an
    active run never. A checkpoint is created first, from which the records can be restored.

    \b
    Examples:
      council clean
      council clean --yes --logs 30d
      council clean --preserved --dry-run
      council clean --pool
      council clean --runs 30d
    """
    if interrupted and runs is None:
        raise click.UsageError("--interrupted requires --runs.")
    output = context.output
    async with _cleaner(context, needs_project=logs is not None or runs is not None) as cleaner:
        found = await cleaner.find(logs=logs, runs=runs, include_interrupted=interrupted)
        wanted = {
            LeftoverStatus.LEFT_OVER,
            *([LeftoverStatus.PRESERVED] if preserved else []),
            *([LeftoverStatus.READY] if pool else []),
        }
        going = [one for one in found if one.status in wanted]
        if not output.as_json:
            _print_leftovers(output, found, going)
        is_wanted = (
            bool(going) and not dry_run and (yes or (not output.as_json and await _confirm_removal(output, going)))
        )
        removals = await cleaner.remove(going) if is_wanted else []
        code = int(any(one.error is not None for one in removals))
        if output.as_json:
            output.json(_result(found, removals, code))
        elif is_wanted:
            _print_removals(output, removals)
        return code


@asynccontextmanager
async def _cleaner(context: CommandContext, *, needs_project: bool) -> AsyncIterator[Cleaner]:
    """Return the cleaner of this project; outside a project, that of this machine, which knows no runs.

    Raises RefusedError if it `needs_project`.
    """
    try:
        project = find_project(Path.cwd())
    except RefusedError:
        if needs_project:
            raise
        project = None
    if project is None:
        yield Cleaner(council_home(os.environ), os.environ, SystemClock())
        return
    async with open_council(context, project.top) as opened:
        yield opened.council.cleaner


def _is_preserved(one: Leftover) -> bool:
    return one.status is LeftoverStatus.PRESERVED


def _print_leftovers(output: Output, found: Sequence[Leftover], going: Sequence[Leftover]) -> None:
    for one in found:
        if one.status is not LeftoverStatus.NEEDED and (one.status is not LeftoverStatus.READY or one in going):
            size = "" if one.kind is LeftoverKind.REFS else format_size_short(one.bytes)
            stays = "" if one in going else "kept: "
            output.text(printable(f"{size:>7}  {one.kind:<9}  {one.name}: {stays}{one.reason}") + "\n")
    for line in _summary(found, going):
        output.text(printable(line) + "\n")


def _summary(found: Sequence[Leftover], going: Sequence[Leftover]) -> Iterator[str]:
    if not going:
        yield "no leftovers to remove"
    if stays := [one for one in found if _is_preserved(one) and one not in going]:
        yield f"{_total(stays)} with work that may exist nowhere else: --preserved removes {_pronoun(stays)}"
    if ready := [one for one in found if one.status is LeftoverStatus.READY and one not in going]:
        repositories = len({one.hub for one in ready})
        where = f" of {repositories} repositories" if repositories > 1 else ""
        yield f"{_total(ready, 'idle worktree')}{where} ready for the next run: --pool removes {_pronoun(ready)}"
    needed = [one for one in found if one.status is LeftoverStatus.NEEDED]
    for run in dict.fromkeys(one.run for one in needed):
        yield f"{_total([one for one in needed if one.run == run])} needed by `council resume {run}`"


def _pronoun(some: Sequence[Leftover]) -> str:
    return "it" if len(some) == 1 else "them"


def _total(some: Sequence[Leftover], noun: str = "leftover") -> str:
    return f"{pluralize(len(some), noun)} ({format_size_short(sum(one.bytes for one in some))})"


async def _confirm_removal(output: Output, going: Sequence[Leftover]) -> bool:
    """Ask for confirmation once, on a terminal."""
    if not can_prompt(output):
        output.text(f"{_total(going)}: add --yes to remove them\n")
        return False
    return await ask_yes_no(output, f"Remove {_total(going)}?")


def _print_removals(output: Output, removals: Sequence[RemovalResult]) -> None:
    for one in removals:
        if one.error is not None:
            output.text(printable(f"{one.leftover.name} could not be removed: {one.error}") + "\n", err=True)
    output.text(f"removed {_total([one.leftover for one in removals if one.error is None])}\n")
    if any(one.leftover.kind is LeftoverKind.RUN and one.error is None for one in removals):
        remedy = "`council checkpoint list` and `council checkpoint restore` bring them back, with their unmerged work"
        output.text(f"records of runs were removed: {remedy}\n")


def _result(found: Sequence[Leftover], removals: Sequence[RemovalResult], code: int) -> dict[str, object]:
    errors = {one.leftover: one.error for one in removals}
    facts = [
        {**asdict(one), "removed": one in errors and errors[one] is None, "error": errors.get(one)} for one in found
    ]
    freed = sum(one.leftover.bytes for one in removals if one.error is None)
    return {"found": facts, "freed": freed, "exit": code}
