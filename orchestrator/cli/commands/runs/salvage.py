"""Commands for unmerged work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby

import click

from orchestrator.api.topics.changes import PreservedWork
from orchestrator.cli.commands.runs.tasks import stat_option
from orchestrator.cli.core.command import CouncilContext, council_command, run_option
from orchestrator.cli.core.completion import complete_preserved_work
from orchestrator.cli.core.confirm import confirm_action, yes_option
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.render.result import format_state
from orchestrator.cli.render.text import described
from orchestrator.engine.reports.report import RunReport


@click.group(cls=SuggestingGroup)
def salvage() -> None:
    """List, apply or drop unmerged work.

    This is the work of attempts that failed, conflicted, or were cancelled or interrupted, even if a later attempt of
    the task landed.

    \b
    Examples:
      council salvage list
      council salvage show models/2
    """


@salvage.command("list")
@run_option
@council_command()
async def list_kept(context: CouncilContext, run: str | None) -> None:
    """List unmerged work, newest run first.

    Includes the state of each task: for a landed task, this is the work of an earlier attempt. The other commands take
    these names; for a run other than the newest, add --run.

    \b
    Examples:
      council salvage list
      council salvage list --run 20260102-030405-ab12
    """
    council = context.council
    named = await council.runs.find(run) if run else None
    reports = {one.run: one for one in await council.runs.list()}
    names = [named] if named else [*reports][::-1]
    found = [one for name in names for one in await council.changes.preserved(name)]
    context.output.answer(lambda: {"preserved": [asdict(one) for one in found]}, _lines(found, reports))
    if not found:
        context.output.notice("no unmerged work" + (f" of run {names[0]}" if run else ""))


def _lines(found: Sequence[PreservedWork], reports: Mapping[str, RunReport]) -> Iterator[str]:
    """Yield a line for each run, followed by a row for each piece of unmerged work."""
    for run, group in groupby(found, key=lambda one: one.run):
        yield f"run {run}"
        report = reports.get(run)  # None: a part of the run is unreadable
        rows = [
            [
                one.name,
                f"task {one.status if report is None else format_state(one.status, report)}",
                _local(one.committed) if one.committed else "",
                one.worktree or one.subject,
            ]
            for one in group
        ]
        yield from described(rows, "  ")


def _applied(name: str, changed: Sequence[str], branch: str | None) -> str:
    outcome = "no changes"
    if branch is not None:
        outcome = f"created branch {branch}"
        if name.endswith("/conflict"):
            outcome += ": switch to it, resolve the conflicts, commit, and merge it into the target"
    elif changed:
        outcome = f"changed {', '.join(changed)}, not committed"
    return outcome


def _local(instant: int) -> str:
    """Return the time of a commit as text, or `?` if it is out of range."""
    try:
        return f"{datetime.fromtimestamp(instant, UTC).astimezone():%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):
        return "?"


@salvage.command()
@click.argument("name", shell_complete=complete_preserved_work)
@stat_option
@run_option
@council_command(prints_json=False)
async def show(context: CouncilContext, name: str, stat: bool, run: str | None) -> None:
    """Show the changes of unmerged work.

    \b
    Examples:
      council salvage show models/2
      council salvage show models/conflict --stat
    """
    difference = await context.council.changes.diff_preserved(name, run, stat=stat)
    context.output.difference(difference)


@salvage.command()
@click.argument("name", shell_complete=complete_preserved_work)
@click.option("--branch", metavar="BRANCH", help="Create this branch in your repository instead.")
@run_option
@council_command()
async def apply(context: CouncilContext, name: str, branch: str | None, run: str | None) -> None:
    """Apply unmerged work to your files, without a commit.

    Applies all changes, or none if they conflict with your files. With --branch, creates a branch in your repository
    instead.

    \b
    Examples:
      council salvage apply models/2
      council salvage apply models/conflict --branch models-by-hand
    """
    changed = await context.council.changes.apply(name, run, branch=branch)
    facts = {"applied": name, "branch": branch, "paths": [] if branch else list(changed)}
    context.output.answer(lambda: facts, [_applied(name, changed, branch)])


@salvage.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_preserved_work)
@yes_option
@run_option
@council_command()
async def drop(context: CouncilContext, names: tuple[str, ...], yes: bool, run: str | None) -> int:
    """Delete unmerged work, after confirmation.

    \b
    Examples:
      council salvage drop models/1 models/2
      council salvage drop models/1 --yes
    """
    council = context.council
    work = await council.runs.find(run)
    kept = {one.name for one in await council.changes.preserved(work)}
    question = f"Delete {', '.join(names)} of run {work}?"
    if not kept.isdisjoint(names) and not await confirm_action(context.output, question, yes=yes):
        return 1
    await council.changes.drop(names, work)
    context.output.answer(lambda: {"dropped": list(names)}, [f"dropped {', '.join(names)}"])
    return 0
