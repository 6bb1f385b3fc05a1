"""Commands for single tasks of active and inactive runs, from any terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack

import anyio
import click

from orchestrator.cli.core.command import CouncilContext, council_command, run_option, verbose_option
from orchestrator.cli.core.completion import (
    complete_approvable_tasks,
    complete_retryable_tasks,
    complete_tasks,
    complete_unfinished_tasks,
)
from orchestrator.cli.core.confirm import ask_yes_no, confirm_action, require_trust, trust_option, yes_option
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.render.text import pluralize, printable
from orchestrator.domain.events.runs import describe_file_changes
from orchestrator.domain.runs.statuses import FINAL_STATUSES, TaskStatus
from orchestrator.domain.wording import join_names
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.engine.state.reload import FileChanges
from orchestrator.errors import RefusedError
from orchestrator.sessions.terminal import UserTerminal

_color = click.option("--color/--no-color", default=None, help="Use colours; default: only in a terminal.")
#: The maximum number of tasks listed in the question before all are cancelled.
_MOST_NAMED = 5
stat_option = click.option("--stat", is_flag=True, help="Show only file names and line counts.")


async def _show_cancelled(context: CouncilContext, report: RunReport, tasks: Sequence[str]) -> int:
    """Print the result and the tasks that are already landing; return the exit code."""
    landing = [task.id for task in report.tasks if task.id in tasks and task.status == TaskStatus.LANDING]
    who = "the run" if report.status is RunStatus.RUNNING else "`council resume`"
    for task in landing:
        context.output.notice(printable(f"{task} was not cancelled: it is landing, and {who} completes that first"))
    return await context.show_result(report, int(bool(landing)))


@click.command()
@click.argument("tasks", metavar="[TASK]...", nargs=-1, shell_complete=complete_unfinished_tasks)
@yes_option
@run_option
@verbose_option
@council_command()
async def cancel(context: CouncilContext, tasks: tuple[str, ...], yes: bool, run: str | None) -> int:
    """Cancel tasks; without TASK, all unfinished ones.

    Stops their sessions and preserves their work on branches. The exit code is 0 if every task has ended, including
    tasks that had already ended, which are reported. A task that is landing is not cancelled, and the exit code is 1.
    An unknown task is an error with exit code 2. Without TASK, asks for confirmation.

    \b
    Examples:
      council cancel models api
      council cancel --yes --run 20260102-030405-ab12
    """
    council = context.council
    report = await council.runs.status(run)
    left = [task.id for task in report.tasks if task.status not in FINAL_STATUSES]
    ended = {task.id: task.status for task in report.tasks if task.id in tasks and task.status in FINAL_STATUSES}
    for name, state in ended.items():
        message = f"task {name!r} has already ended (state: {state.replace('_', ' ')})"
        context.output.notice(printable(f"nothing to cancel: {message}"))
    if not left and not tasks:
        context.output.notice(f"nothing to cancel: all tasks of run {report.run} have ended")
    if ended.keys() >= set(tasks or left):
        return await context.show_result(report, code=0)
    named = join_names(left, _MOST_NAMED)
    question = f"Cancel {pluralize(len(left), 'unfinished task')} of run {report.run} ({named})?"
    if not tasks and not await confirm_action(context.output, question, yes=yes):
        return 1
    return await _show_cancelled(context, await council.tasks.cancel(*tasks, run=report.run), tasks or left)


@click.group(cls=SuggestingGroup)
def task() -> None:
    """Exclude tasks from further attempts.

    \b
    Examples:
      council task ignore models --reason "done by hand"
    """


@task.command("ignore")
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_unfinished_tasks)
@click.option("--reason", metavar="TEXT", required=True, help="The reason, which is recorded.")
@run_option
@verbose_option
@council_command()
async def ignore_tasks(context: CouncilContext, tasks: tuple[str, ...], reason: str, run: str | None) -> int:
    """Cancel tasks, and prevent further attempts.

    Also cancels tasks that are active in another process. They stay cancelled until `council retry`.

    \b
    Examples:
      council task ignore models --reason "done by hand"
      council task ignore models api --reason "not before the release"
    """
    return await _show_cancelled(context, await context.council.tasks.ignore(*tasks, reason=reason, run=run), tasks)


@click.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_retryable_tasks)
@click.option("--from", "phase", metavar="PHASE", help="Retry from this phase of their workflow.")
@click.option("--reload", "reloads", is_flag=True, help="Adopt the prompts, limits and adapters of the current file.")
@run_option
@trust_option
@verbose_option
@council_command()
async def retry(
    context: CouncilContext, tasks: tuple[str, ...], phase: str | None, reloads: bool, run: str | None
) -> int:
    """Retry terminal tasks that have not landed.

    Resets their attempts. A task with a workflow continues at its current phase, or at PHASE; the results of earlier
    phases stay. An active run starts the tasks immediately; otherwise run `council resume`.

    A run keeps the prompts, limits and adapters that it recorded at its start. --reload adopts those of the current
    file for these tasks; `needs`, `owns` and `workflow` cannot change. Pending, blocked and queued tasks adopt them
    too, and keep their state.

    \b
    Examples:
      council retry models
      council retry models --reload
      council retry models --from plan
      council retry models api --run 20260102-030405-ab12
    """
    council = context.council
    changes = await council.tasks.file_changes(run)
    kept = {} if reloads else {name: keys for name, keys in changes.tasks.items() if name in tasks}
    if kept or changes.keys:
        starts_them = bool(kept) and await council.runs.is_live(await council.runs.find(run))
        stop_first = tuple(kept) if starts_them else ()
        message = describe_file_changes(changes.file, kept, changes.keys, run, stop_first=stop_first)
        context.output.notice(printable(message))
    if reloads:
        await require_reload_trust(changes)
    report = await council.tasks.retry(*tasks, run=run, from_phase=phase, reload=changes if reloads else None)
    for name in tasks if reloads else ():
        context.output.notice(printable(describe_reload(name, changes)))
    return await context.show_result(report, code=0)


async def require_reload_trust(changes: FileChanges) -> None:
    """Have the user confirm the permissions that a file requests before tasks adopt its settings."""
    if changes.has_tasks and changes.config is not None:
        await require_trust(changes.config, is_named=False)


def describe_reload(task: str, changes: FileChanges) -> str:
    """Return a line with the settings that a task has adopted from the file."""
    keys = changes.tasks.get(task, ())
    return (
        f"{task}: reloaded {', '.join(keys)} from {changes.file}" if keys else f"{task}: {changes.file} has no changes"
    )


@click.command()
@click.argument("task", metavar="TASK", shell_complete=complete_unfinished_tasks)
@click.argument("text", metavar="MESSAGE")
@run_option
@verbose_option
@council_command()
async def tell(context: CouncilContext, task: str, text: str, run: str | None) -> int:
    """Send a message to the agents of a task.

    A running agent receives it after a tool call or at the end of its turn, if its CLI supports that. Otherwise the
    next session does, which continues the conversation if possible. The work does not land before that. The command
    prints when and how this message is delivered. Every later conversation of the task receives the message as well.

    \b
    Examples:
      council tell models "use the existing validator"
      council tell models "skip the migration" --run 20260102-030405-ab12
    """
    sent = await context.council.tasks.tell(task, text, run=run)
    context.output.answer(
        lambda: {
            "task": task,
            "message": sent.id,
            "receiver": sent.receiver,
            "delivery": sent.delivery,
            "exit": 0,
        },
        [printable(f"{task}: {sent.delivery}")],
    )
    return 0


@click.command()
@click.argument("task", metavar="TASK", shell_complete=complete_unfinished_tasks)
@click.option(
    "--then",
    type=click.Choice(["ask", "land", "continue"]),
    default="ask",
    show_default=True,
    help="What to do with the work after the conversation.",
)
@run_option
@verbose_option
@council_command(prints_json=False)
async def attach(context: CouncilContext, task: str, then: str, run: str | None) -> int:
    """Open the conversation of a task in this terminal.

    Stops the running session of the task, and opens its conversation in the CLI itself, in the same worktree and
    sandbox. Meanwhile, no other session of the task starts. When you leave the CLI, its work is checked and lands, or
    the next session continues the work and the conversation. This also happens if the terminal is closed or the CLI
    is killed.

    \b
    Examples:
      council attach models
      council attach models --then continue
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise RefusedError("`council attach` needs a terminal", f"send a message: `council tell {task} MESSAGE`")

    async def is_complete() -> bool:
        if then != "ask":
            return then == "land"
        with anyio.CancelScope() as asking:
            stops.callback(asking.cancel)
            return await ask_yes_no(context.output, f"Is task {task} complete? If so, its work is checked and lands.")
        return False

    stops = ExitStack()
    stops.callback(context.council.stop)
    context.interrupt.stop = stops.close
    report = await context.council.runs.attach(task, UserTerminal(is_complete), run=run)
    return await context.show_result(report, code=0)


@click.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_approvable_tasks)
@click.option("--note", metavar="TEXT", help="A note, which is recorded.")
@run_option
@verbose_option
@council_command()
async def approve(context: CouncilContext, tasks: tuple[str, ...], note: str | None, run: str | None) -> int:
    """Approve the result of a phase, so that its task continues.

    `council status` lists the tasks that wait for approval, and `council show TASK` shows the result. An active run
    continues the tasks immediately; otherwise run `council resume`.

    \b
    Examples:
      council approve models
      council approve models --note "as discussed"
    """
    report = await context.council.tasks.approve(*tasks, note=note, run=run)
    return await context.show_result(report, code=0)


@click.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, shell_complete=complete_approvable_tasks)
@click.option("--note", metavar="TEXT", help="A note to the session that repeats the phase.")
@run_option
@verbose_option
@council_command()
async def reject(context: CouncilContext, tasks: tuple[str, ...], note: str | None, run: str | None) -> int:
    """Reject the result of a phase, and repeat the phase.

    The session that repeats it gets the note. An active run starts it immediately; otherwise run `council resume`. To
    end the task instead, run `council cancel TASK`.

    \b
    Examples:
      council reject models --note "keep the old names"
    """
    report = await context.council.tasks.reject(*tasks, note=note, run=run)
    return await context.show_result(report, code=0)


@click.command()
@click.argument("task", shell_complete=complete_tasks)
@stat_option
@_color
@run_option
@council_command(prints_json=False)
async def diff(context: CouncilContext, task: str, stat: bool, color: bool | None, run: str | None) -> None:
    """Show a task's changes, including those of a running session.

    If the run was killed, shows the changes in the worktree of the interrupted session.

    \b
    Examples:
      council diff models
      council diff models --stat
    """
    difference = await context.council.changes.diff(task, run, stat=stat)
    context.output.difference(difference, color=color)
