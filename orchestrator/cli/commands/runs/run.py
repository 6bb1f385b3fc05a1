"""Commands that execute a run: `run`, `resume`, `merge` and `work`."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import click

from orchestrator.api import execution
from orchestrator.cli.commands.runs.run_options import coordination_options, parse_budget
from orchestrator.cli.commands.runs.tasks import describe_reload, require_reload_trust
from orchestrator.cli.core.command import (
    CommandContext,
    CouncilContext,
    async_command,
    council_command,
    open_council,
    run_argument,
    store_option,
    verbose_option,
)
from orchestrator.cli.core.confirm import require_trust, trust_option
from orchestrator.cli.core.options import parsed_by
from orchestrator.cli.core.run_source import is_prompt, load_run_config
from orchestrator.cli.live.display import show_progress
from orchestrator.cli.render.findings import finding_lines, findings_exit_code
from orchestrator.cli.render.next_steps import needs_retry, own_branch, waits_for_merge
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.plan import flowchart, plan_text
from orchestrator.cli.render.text import printable
from orchestrator.config.coordination import CoordinationOverrides
from orchestrator.config.inline import InlineTasks, select_tasks, with_capacity, with_failing_base
from orchestrator.domain.runs.statuses import LANDING_STATUSES
from orchestrator.domain.settings.names import check_branch
from orchestrator.domain.settings.run_settings import MAX_CAPACITY, Budget
from orchestrator.domain.wording import join_names
from orchestrator.engine.reports.report import RunReport, RunStatus
from orchestrator.errors import NothingToMerge, RefusedError, StoreUnavailable

if TYPE_CHECKING:
    from orchestrator.api.execution import BackgroundProcess
    from orchestrator.config.model import RunConfig
    from orchestrator.engine.reports.dry_run import DryRun
    from orchestrator.plugins import Plugins

allow_failing_base_option = click.option(
    "--allow-failing-base", is_flag=True, help="Start sessions even if checks fail on the base."
)

capacity_option = click.option(
    "-j",
    "--capacity",
    metavar="N",
    type=click.IntRange(1, MAX_CAPACITY),
    help="The maximum number of concurrent sessions; default: the value in the file or the run.",
)


detach_option = click.option("--detach", is_flag=True, help="Continue in the background.")


#: Rejects an invalid branch name here: later it would be reported as an error in the file.
_parse_branch = parsed_by(check_branch)


@click.command("run")
@click.argument("source", metavar="[FILE|PROMPT]", required=False, type=click.Path())
@click.option(
    "--task",
    "prompts",
    metavar="PROMPT",
    multiple=True,
    help="Run this prompt instead of the tasks of the file; repeatable.",
)
@click.option(
    "--only",
    metavar="TASK",
    multiple=True,
    help="Run only this task of the file and the tasks that it needs; repeatable.",
)
@capacity_option
@click.option(
    "--adapter", metavar="ADAPTER", help="Adapter for the prompts: a name from the file, or an installed type."
)
@click.option("--base", metavar="BRANCH", callback=_parse_branch, help="Branch from which the prompts start.")
@click.option("--target", metavar="BRANCH", callback=_parse_branch, help="Branch on which the prompts land.")
@click.option("--check", "checks", metavar="COMMAND", multiple=True, help="Check for the prompts; repeatable.")
@click.option("--allow-deferred", is_flag=True, help="Start even if the target's checkout has changes; land on resume.")
@allow_failing_base_option
@click.option("--follow", is_flag=True, help="Keep running, and add new tasks of the trackers as they appear.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan; start nothing.")
@click.option("--mermaid", is_flag=True, help="With --dry-run, print a Mermaid flowchart.")
@detach_option
@coordination_options
@trust_option
@verbose_option
@store_option
@async_command()
async def run_file(  # noqa: PLR0917  one for each option
    context: CommandContext,
    source: str | None,
    prompts: tuple[str, ...],
    only: tuple[str, ...],
    capacity: int | None,
    adapter: str | None,
    base: str | None,
    target: str | None,
    checks: tuple[str, ...],
    allow_deferred: bool,
    allow_failing_base: bool,
    follow: bool,
    dry_run: bool,
    mermaid: bool,
    detach: bool,
    coordination: CoordinationOverrides,
) -> int:
    """Run the tasks of a file, or a prompt, and land their work.

    FILE defaults to council.yaml, in the current folder or at the root of the repository. A PROMPT, like --task, is a
    task with the adapters and defaults of council.yaml, or without a file with the only adapter whose program is
    installed. An argument that ends in .yaml or .yml, or that exists, is a FILE.

    \b
    Examples:
      council run
      council run "fix the failing test in tests/test_api.py"
      council run night.yaml --dry-run
      council run --only api -j 2
      council run --detach
      council run --follow
      council run --dry-run --mermaid
      council run --task "Add a --quiet option." --check "make test"
      council run --task "Fix issue 12." --task "Fix issue 15." --adapter fixer --target fixes
    """
    file = None if source is None or is_prompt(source) else Path(source)
    if source is not None and file is None:
        prompts = (source, *prompts)
    if not all(map(str.strip, prompts)):
        raise click.UsageError("the prompt is empty: write what to do, or omit it to run the tasks of a file.")
    if (adapter, base, target, checks) != (None, None, None, ()) and not prompts:
        raise click.UsageError(
            "--adapter, --base, --target and --check apply to prompts; for a file, set them in the file."
        )
    if detach and dry_run:
        raise click.UsageError("--dry-run and --detach cannot be combined.")
    if follow and (prompts or only):
        raise click.UsageError("--follow cannot be combined with --only or prompts: new tasks come from trackers.")
    if only and prompts:
        raise click.UsageError("--only and prompts cannot be combined: a prompt replaces the tasks of the file.")
    if mermaid and (context.output.as_json or not dry_run):
        raise click.UsageError("--mermaid requires --dry-run and cannot be combined with --json.")
    tasks = InlineTasks(prompts, adapter, base, target, checks) if prompts else None
    plugins, config = await load_run_config(file, tasks)
    config = select_tasks(config, only) if only else config
    config = config if capacity is None else with_capacity(config, capacity)
    await require_trust(config, is_named=file is not None)
    if dry_run:
        config = with_failing_base(config) if allow_failing_base else config
        plan = await execution.perform_dry_run(
            config, plugins, allow_deferred=allow_deferred, coordination=coordination
        )
        return _show_plan(plan, context.output, mermaid=mermaid)
    async with open_council(context, config, plugins, "pause") as opened:
        council = opened.council
        run = await council.runs.create(
            allow_deferred=allow_deferred,
            allow_failing_base=allow_failing_base,
            coordination=coordination,
            follow=follow,
        )
        await _warn_of_invisible_files(config, plugins, context.output)
        if detach:
            return _show_background(context.output, await council.runs.start(run))
        return await _execute(opened, run, 0, lambda: council.runs.resume(run, coordination=coordination))


async def _warn_of_invisible_files(config: RunConfig, plugins: Plugins, output: Output) -> None:
    for line in finding_lines(await execution.find_invisible_files(config, plugins)):
        output.notice(line)


def _show_plan(plan: DryRun, output: Output, *, mermaid: bool) -> int:
    code = findings_exit_code(plan.findings)
    if output.as_json:
        output.json({**plan.to_json(), "exit": code})
        return code
    output.text(flowchart(plan) if mermaid else plan_text(plan))
    if plan.findings:
        output.text("".join(f"{line}\n" for line in ("", *finding_lines(plan.findings))), err=mermaid)
    return code


@click.command()
@run_argument
@click.option("--budget", metavar="LIMITS", callback=parsed_by(parse_budget), help="New limits of the run's budget.")
@capacity_option
@detach_option
@allow_failing_base_option
@click.option("--reload", "reloads", is_flag=True, help="Adopt the prompts, limits and adapters of the current file.")
@trust_option
@coordination_options
@verbose_option
@council_command(on_outage="wait")
async def resume(
    context: CouncilContext,
    run: str | None,
    budget: Budget | None,
    capacity: int | None,
    detach: bool,
    allow_failing_base: bool,
    reloads: bool,
    coordination: CoordinationOverrides,
) -> int:
    """Resume an interrupted run.

    RUN defaults to the newest run. LIMITS are tokens, cost (US dollars) and time, separated by commas. --reload adopts
    the settings of the current file for all tasks that have not landed, like `council retry TASK --reload`.

    \b
    Examples:
      council resume
      council resume --reload
      council resume 20260102-030405-ab12
      council resume --budget tokens=5M,cost=20,time=8h
    """
    if detach and coordination.explicit():
        raise click.UsageError(
            "--detach cannot be combined with coordination options: set their environment variables instead."
        )
    council = context.council
    name = await council.runs.find(run)
    interrupted = await council.runs.interrupted()
    report = None if name in interrupted else await council.runs.status(name)
    is_finished = report is not None and report.merges is None
    others = [] if run else [one for one in interrupted if one != name]
    if others and (report is None or report.status is not RunStatus.RUNNING):  # a running one is refused below
        context.output.notice(_other_runs("interrupted or halted", others))
    if reloads and not await council.runs.is_live(name):  # a running one is refused below
        await _reload(context, name)
    if detach and (report is None or report.has_unfinished_tasks or report.status is RunStatus.RUNNING):
        started = await council.runs.start(
            name, budget=budget, capacity=capacity, allow_failing_base=allow_failing_base
        )
        return _show_background(context.output, started)
    after = await council.history.position()
    resumed = partial(
        council.runs.resume,
        name,
        budget=budget,
        capacity=capacity,
        allow_failing_base=allow_failing_base,
        coordination=coordination,
    )
    return await _execute(context, name, after, resumed, was_finished=is_finished)


async def _reload(context: CouncilContext, run: str) -> None:
    """Adopt the settings of a run's file for its tasks, and print which tasks have changed."""
    changes = await context.council.tasks.file_changes(run)
    await require_reload_trust(changes)
    for task in await context.council.tasks.reload(changes, run=run):
        context.output.notice(printable(describe_reload(task, changes)))
    if not changes:
        context.output.notice(printable(f"{changes.file} has no changes"))


@click.command()
@run_argument
@verbose_option
@council_command()
async def merge(context: CouncilContext, run: str | None) -> int:
    """Land queued work, and merge the run's own branch into its base.

    Work is queued while the target cannot be updated, for example because its checkout has changes. If the run landed
    on council/RUN, that branch is merged into the base with the checks of all tasks, as a separate run with one task.
    The branch is merged once no work is queued. No session is started. A merge that could not land is continued. The
    exit code is 0 if there is nothing to merge.

    \b
    Examples:
      council merge
      council merge 20260102-030405-ab12
    """
    council = context.council
    name = await council.runs.find(run)
    report = await council.runs.status(name)
    if report.status is RunStatus.RUNNING:
        raise RefusedError(f"run {name} is running and lands its work itself", "wait until it ends")
    others = [] if run else [one.run for one in await council.runs.list() if waits_for_merge(one) and one.run != name]
    if others:
        context.output.notice(_other_runs("not merged", others))
    waiting = any(task.status in LANDING_STATUSES for task in report.tasks)
    if not waiting and not own_branch(report):
        return _show_nothing(context.output, report, f"run {name} has nothing to merge")
    after = await council.history.position()
    if waiting:
        code = await _execute(context, name, after, lambda: council.runs.land(name))
        report = await council.runs.status(name)
        if not own_branch(report) or any(task.status in LANDING_STATUSES for task in report.tasks):
            return code  # the next `council merge` merges the branch with the work that is still queued
        after = await council.history.position()
    try:
        made = await council.runs.create_merge(name)
    except NothingToMerge as nothing:
        return _show_nothing(context.output, report, str(nothing))
    if report.has_unfinished_tasks:
        context.output.notice(f"run {name} has unfinished tasks: `council resume {name}` continues them")
    return await _execute(context, made, after, lambda: council.runs.resume(made))


def _show_nothing(output: Output, report: RunReport, line: str) -> int:
    """Print that there is nothing to merge; return the exit code."""
    output.answer(lambda: {**report.to_json(), "exit": 0}, line.split("\n"))
    return 0


def _other_runs(state: str, others: Sequence[str]) -> str:
    """Return a line about older runs in a state; commands select the newest run."""
    return f"also {state}: {join_names(others[::-1], 1)} (`council runs`)"


@click.command()
@run_argument
@capacity_option
@click.option("--follow", is_flag=True, help="Also join runs that start later.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="LABEL",
    help="A label of this machine, for tasks with this label; repeatable. Default: COUNCIL_LABELS.",
)
@partial(coordination_options, joins=True)
@verbose_option
@council_command(on_outage="wait")
async def work(
    context: CouncilContext,
    run: str | None,
    capacity: int | None,
    follow: bool,
    labels: Sequence[str],
    coordination: CoordinationOverrides,
) -> int:
    """Join active runs as an additional worker.

    The worker claims free tasks whose CLI is installed here, and takes over those of processes that have exited. It
    ends when no task is left. With RUN it joins only this run, which may be inactive. On another machine, it needs only
    --state, with the URL of a store on a server.

    \b
    Examples:
      council work
      council work 20260102-030405-ab12 --capacity 2
      council work --follow
      council work --state postgresql://db.example.org/council --label gpu
    """
    if run is not None and follow:
        raise click.UsageError("--follow and RUN cannot be combined: --follow joins all runs.")
    council = context.council

    async def join(name: str) -> int:
        work = partial(council.runs.work, name, capacity=capacity, coordination=coordination, labels=labels or None)
        return await _execute(context, name, await council.history.position(), work)

    if run is not None:
        return await join(await council.runs.find(run))
    code = None
    async with aclosing(council.runs.live(follow=follow)) as runs:
        async for name in runs:
            code = max(code or 0, await join(name))
            if context.interrupt.is_stopping:
                break
    if code is None:
        context.output.notice("no active run: `council run` starts one, `council resume` resumes one")
    return code or 0


def _show_background(output: Output, started: BackgroundProcess) -> int:
    run, pid = started.run, started.pid
    output.answer(
        lambda: {"run": run, "pid": pid, "log": str(started.log), "exit": 0},
        (
            f"run {run} continues in the background as process {pid}",
            f"  follow: council watch {run}",
            f"  stop:   kill {pid} (council resume {run} resumes it)",
        ),
    )
    return 0


async def _execute(
    context: CouncilContext,
    run: str,
    after: int,
    execute: Callable[[], Awaitable[RunReport]],
    *,
    was_finished: bool = False,
) -> int:
    """Execute a run and print its events and result; the first signal stops it.

    `was_finished`: its tasks had ended before.
    """
    council = context.council
    context.interrupt.stop, context.log.run = council.stop, run
    with suppress(RefusedError):  # `execute` reports it better
        if not await council.runs.is_live(run):
            await anyio.to_thread.run_sync(_remove_background_error, council.project.background_log(run))
    async with show_progress(council, run, context.output, after) as progress:
        report = await execute()
        with suppress(StoreUnavailable):  # the report is complete without the last events
            await progress.reach(await council.history.position())
    # Work that the user has merged is recorded as landed only by this execution.
    return await context.show_result(report, was_finished=was_finished and needs_retry(report))


def _remove_background_error(log: Path) -> None:
    """Remove the error log of a background process, unless it is open. Blocks."""
    with suppress(OSError):
        if not os.path.samestat(log.stat(), os.fstat(2)):
            log.unlink()
