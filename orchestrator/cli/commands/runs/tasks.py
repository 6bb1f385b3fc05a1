"""Commands for single tasks, from any terminal: on a run that is at work as well as on one that is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Sequence

import click

from orchestrator.api.council import Council
from orchestrator.cli.core.command import (
    CommandContext,
    json_option,
    open_council,
    run_command,
    run_option,
    show_result,
    store_option,
    verbose_option,
)
from orchestrator.cli.core.completion import (
    complete_approvable_tasks,
    complete_retryable_tasks,
    complete_tasks,
    complete_unfinished_tasks,
)
from orchestrator.cli.core.confirm import confirm_action, yes_option
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.core.trust import require_trust, trust_option
from orchestrator.cli.render.events import describe_file_changes
from orchestrator.cli.render.text import pluralize, printable
from orchestrator.domain.runs.model import FINAL_STATUSES, TaskStatus
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.errors import join_names

_color = click.option("--color/--no-color", default=None, help="Colours; by default on a terminal only.")
#: Unfinished tasks that are named where all are to be cancelled.
_MOST_NAMED = 5
stat_option = click.option("--stat", is_flag=True, help="Files and counts of lines only.")


def _request_and_show(ask: Callable[[Council], Awaitable[RunReport]], *, as_json: bool) -> None:
    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            await show_result(context, council, await ask(council), code=0)
            return 0

    run_command(command, as_json=as_json)


def _print_still_landing(context: CommandContext, report: RunReport, tasks: Sequence[str]) -> int:
    """Name those of the tasks that could not be cancelled because they are landing; return the exit code."""
    landing = [task.id for task in report.tasks if task.id in tasks and task.status == TaskStatus.LANDING]
    who = "the run" if report.status is RunStatus.RUNNING else "`council resume`"
    for task in landing:
        context.output.notice(printable(f"could not cancel {task}: it is landing, which {who} finishes first"))
    return 1 if landing else 0


@click.command()
@click.argument("tasks", metavar="[TASK]...", nargs=-1, shell_complete=complete_unfinished_tasks)
@yes_option
@run_option
@verbose_option
@store_option
@json_option
def cancel(tasks: tuple[str, ...], yes: bool, run: str | None, as_json: bool) -> None:
    """Cancel tasks; without TASK, all that have not ended.

    Sessions are stopped, what they did is kept on branches. The exit code is 0 if every task has ended then, also if it
    had ended before, which is reported. A landing under way is finished: its task is not cancelled, and the exit code
    is 1. An unknown task is an error, with exit code 2. Without TASK it asks first.

    \b
    Examples:
      council cancel models api
      council cancel --yes --run 20260102-030405-ab12
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            report = await council.runs.status(run)
            left = [task.id for task in report.tasks if task.status not in FINAL_STATUSES]
            ended = {
                task.id: task.status for task in report.tasks if task.id in tasks and task.status in FINAL_STATUSES
            }
            for name, state in ended.items():
                words = f"task {name!r} has already ended (state: {state.replace('_', ' ')})"
                context.output.notice(printable(f"nothing to cancel: {words}"))
            if not left and not tasks:
                context.output.notice(f"nothing to cancel: all tasks of run {report.run} have ended")
            if ended.keys() >= set(tasks or left):
                await show_result(context, council, report, code=0)
                return 0
            named = join_names(left, _MOST_NAMED)
            question = f"Cancel {pluralize(len(left), 'unfinished task')} of run {report.run} ({named})?"
            if not tasks and not await confirm_action(context.output, question, yes=yes):
                return 1
            cancelled = await council.tasks.cancel(*tasks, run=report.run)
            code = _print_still_landing(context, cancelled, tasks or left)
            await show_result(context, council, cancelled, code)
            return code

    run_command(command, as_json=as_json)


@click.group(cls=SuggestingGroup)
def task() -> None:
    """Say what is to become of single tasks.

    \b
    Examples:
      council task ignore models --reason "done by hand"
    """


@task.command("ignore")
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_unfinished_tasks)
@click.option("--reason", metavar="TEXT", required=True, help="Why nobody is to try them.")
@run_option
@verbose_option
@store_option
@json_option
def ignore_tasks(tasks: tuple[str, ...], reason: str, run: str | None, as_json: bool) -> None:
    """End tasks, and have nobody try them again.

    They are cancelled, whichever process is at work on them, and stay so until `council retry`.

    \b
    Examples:
      council task ignore models --reason "done by hand"
      council task ignore models api --reason "not before the release"
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            ignored = await council.tasks.ignore(*tasks, reason=reason, run=run)
            code = _print_still_landing(context, ignored, tasks)
            await show_result(context, council, ignored, code)
            return code

    run_command(command, as_json=as_json)


@click.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_retryable_tasks)
@click.option("--from", "phase", metavar="PHASE", help="Go on at this phase of their workflow.")
@click.option("--reload", "reloads", is_flag=True, help="Take their prompts, limits and adapters from the file again.")
@run_option
@trust_option
@verbose_option
@store_option
@json_option
def retry(tasks: tuple[str, ...], phase: str | None, reloads: bool, run: str | None, as_json: bool) -> None:
    """Try tasks again that are over without having landed.

    They have all of their attempts before them. Those with a workflow go on at the phase that they were at, or at
    PHASE; what came of the phases before that stays. A run that is at work does so at once; otherwise `council resume`
    does.

    A run keeps the prompts, limits and adapters that it recorded when it started. With --reload these tasks take over
    what the file says now; `needs`, `owns` and `workflow` can't change. A task that waits to start or to land takes it
    over, too, and stays in its state.

    \b
    Examples:
      council retry models
      council retry models --reload
      council retry models --from plan
      council retry models api --run 20260102-030405-ab12
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            changes = await council.tasks.file_changes(run)
            kept = {} if reloads else {name: keys for name, keys in changes.tasks.items() if name in tasks}
            if kept or changes.keys:
                words = describe_file_changes(kept, changes.keys)
                context.output.notice(printable(f"{changes.file} has changed, the run keeps what it recorded: {words}"))
            if reloads and changes.has_tasks and changes.config is not None:
                await require_trust(changes.config, is_named=False)
            report = await council.tasks.retry(*tasks, run=run, from_phase=phase, reload=changes if reloads else None)
            await show_result(context, council, report, code=0)
            return 0

    run_command(command, as_json=as_json)


@click.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_approvable_tasks)
@click.option("--note", metavar="TEXT", help="Why, for the record.")
@run_option
@verbose_option
@store_option
@json_option
def approve(tasks: tuple[str, ...], note: str | None, run: str | None, as_json: bool) -> None:
    """Approve what tasks came to, so that they go on.

    `council status` lists those that wait for it, `council show TASK` has what they came to. A run that is at work goes
    on at once; otherwise `council resume` does.

    \b
    Examples:
      council approve models
      council approve models --note "as discussed"
    """
    _request_and_show(lambda council: council.tasks.approve(*tasks, note=note, run=run), as_json=as_json)


@click.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_approvable_tasks)
@click.option("--note", metavar="TEXT", help="What is to be better, as their sessions are told.")
@run_option
@verbose_option
@store_option
@json_option
def reject(tasks: tuple[str, ...], note: str | None, run: str | None, as_json: bool) -> None:
    """Have done again what waits for approval.

    The phase that each task is at begins anew, with the note. A run that is at work goes on at once; otherwise `council
    resume` does. To have none of it, `council cancel TASK`.

    \b
    Examples:
      council reject models --note "keep the old names"
    """
    _request_and_show(lambda council: council.tasks.reject(*tasks, note=note, run=run), as_json=as_json)


@click.command()
@click.argument("task", shell_complete=complete_tasks)
@stat_option
@_color
@run_option
@store_option
def diff(task: str, stat: bool, color: bool | None, run: str | None) -> None:
    """Show what a task has changed, so far if it is at work.

    After a run was killed, the worktree that an interrupted session left is compared.

    \b
    Examples:
      council diff models
      council diff models --stat
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            difference = await council.changes.diff(task, run, stat=stat)
            context.output.difference(difference, color=should_use_color(color))
            return 0

    run_command(command, as_json=False)


def should_use_color(color: bool | None) -> bool:
    """Return whether a difference is to be coloured."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") if color is None else color
