"""The commands that show and change the merge queue of a run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import click

from orchestrator.cli.core.command import CouncilContext, council_command, run_option, verbose_option
from orchestrator.cli.core.completion import complete_unfinished_tasks
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.render.text import align_columns, printable
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.landing_order import QueuedTask
from orchestrator.domain.settings.quantities import format_duration
from orchestrator.protocols import JsonObject


class _QueueGroup(SuggestingGroup):
    """A group whose only argument may also be a run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, where a single one that is not a command means `--run`."""
        words = [word for word in args if not word.startswith("-")]
        if len(words) == 1 and args[0] == words[0] and words[0] not in self.commands:
            args = ["--run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_QueueGroup, invoke_without_command=True, subcommand_metavar="[RUN] | COMMAND [ARGS]...")
@run_option
@council_command()
async def queue(context: CouncilContext, run: str | None) -> None:
    """Show the merge queue of a run, and why each task waits.

    Lists the built tasks in landing order, then the held ones: the merge that is checked for each, and the tasks ahead
    that this merge contains.

    \b
    Examples:
      council queue
      council queue --run 20260102-030405-ab12 --json
      council queue hold models --reason "not before the release"
    """
    name = await context.council.runs.find(run)
    found = await context.council.runs.queue(name)
    context.answer_with_damage(
        lambda: {"run": name, "queue": [_to_json(one) for one in found]},
        _lines(found, time.time()) if found else ["no tasks are queued to land"],
    )


@queue.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_unfinished_tasks)
@click.option("--reason", metavar="TEXT", help="The reason, which is recorded.")
@run_option
@verbose_option
@council_command()
async def hold(context: CouncilContext, tasks: tuple[str, ...], reason: str | None, run: str | None) -> int:
    """Hold tasks: they do not land until they are released.

    Their sessions continue, and their work is queued. The run waits for held tasks, and ends only after they are
    released or cancelled. A task that is already landing is not held, and the exit code is 1.

    \b
    Examples:
      council queue hold models
      council queue hold models api --reason "not before the release"
    """
    report = await context.council.tasks.hold(*tasks, reason=reason, run=run)
    moved = {TaskStatus.LANDING, TaskStatus.LANDED}
    late = [task.id for task in report.tasks if task.id in tasks and task.status in moved]
    for task in late:
        context.output.notice(printable(f"{task} was not held: it was already landing"))
    for task in dict.fromkeys(tasks):
        if task not in late:  # the state of a running task does not show it
            context.output.notice(printable(f"{task} is held until `council queue release {shlex.quote(task)}`"))
    return await context.show_result(report, int(bool(late)))


@queue.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_unfinished_tasks)
@run_option
@verbose_option
@council_command()
async def release(context: CouncilContext, tasks: tuple[str, ...], run: str | None) -> int:
    """Let held tasks land, also those that wait for a predicted conflict.

    An active run lands them in queue order; otherwise run `council resume`.

    \b
    Examples:
      council queue release models
    """
    return await context.show_result(await context.council.tasks.release(*tasks, run=run), code=0)


@queue.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_unfinished_tasks)
@run_option
@verbose_option
@council_command()
async def bump(context: CouncilContext, tasks: tuple[str, ...], run: str | None) -> int:
    """Move tasks to the front of the merge queue.

    They keep the given order. A task that is not built yet is moved once it is. Checks of the current merge continue.

    \b
    Examples:
      council queue bump models
    """
    return await context.show_result(await context.council.tasks.bump(*tasks, run=run), code=0)


def _to_json(one: QueuedTask) -> JsonObject:
    check = None if one.check is None else one.check.model_dump(mode="json")
    return {**asdict(one), "check": check}


def _lines(queue: Sequence[QueuedTask], now: float) -> Iterator[str]:
    rows: list[Sequence[str]] = []
    for one in queue:
        state = "held" if one.held or (one.waits_for and not one.stacked) else one.status
        rows.append((f"{one.position}", one.task, state, _describe_check(one, now), one.reason))
    yield from align_columns(rows)


def _describe_check(one: QueuedTask, now: float) -> str:
    """Return the checked merge, its base commit, and the start time."""
    if one.check is None:
        return "-"
    ahead = f" with {', '.join(one.check.ahead)}" if one.check.ahead else ""
    elapsed = format_duration(round(max(now - one.check.since, 0)))
    return f"{one.check.commit[:10]} on {one.check.onto[:10]}{ahead}, {one.check.state} since {elapsed}"
