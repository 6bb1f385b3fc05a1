"""Commands that save, show and restore checkpoints of runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial

import click

from orchestrator.api.council import Council
from orchestrator.cli.core.command import CouncilContext, council_command, run_argument, run_option
from orchestrator.cli.core.completion import complete_checkpoints
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.render.text import printable, wrapped
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.engine.scheduler.restore import RestoreResult
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject
from orchestrator.state.documents.checkpoints import WHOLE_STORE, Checkpoint, RestorePlan
from orchestrator.system.clock import format_local_time

_all_option = click.option("--all", "whole", is_flag=True, help="Create a checkpoint of all runs together.")
_id_argument = click.argument("checkpoint_id", metavar="CHECKPOINT", shell_complete=complete_checkpoints)


@click.group(cls=SuggestingGroup)
def checkpoint() -> None:
    """Save and restore checkpoints of a run.

    An active run creates a checkpoint every five minutes and keeps the newest twelve. `cancel`, `clean` and `restore`
    create one before they start. A checkpoint can be restored until its position is pruned from the state log.

    \b
    Examples:
      council checkpoint create --reason "before the big merge"
      council checkpoint show 3
      council checkpoint restore 3
    """


@checkpoint.command()
@click.option("--reason", metavar="TEXT", default="manual", help="The reason for the checkpoint.")
@run_argument
@_all_option
@council_command()
async def create(context: CouncilContext, reason: str, run: str | None, whole: bool) -> None:
    """Create a checkpoint of a run's current state.

    RUN defaults to the newest run.

    \b
    Examples:
      council checkpoint create
      council checkpoint create 20260102-030405-ab12
      council checkpoint create --all --reason "before the upgrade"
    """
    _check_scope(run, whole=whole)
    try:
        named = run and await context.council.runs.find(run)
    except RefusedError as error:
        remedy = f"{error.remedy}; to describe the checkpoint use `--reason {shlex.quote(run or '')}`"
        raise RefusedError(error.message, remedy) from None
    made = await context.council.checkpoints.create(named, reason=reason, whole=whole)
    context.output.answer(lambda: _facts(made), [f"created checkpoint {made.id}"])


@checkpoint.command("list")
@partial(run_option, words="List only checkpoints of this run.")
@click.option("--all", "whole", is_flag=True, help="List only checkpoints of all runs together.")
@council_command(is_short_lived=True)
async def list_checkpoints(context: CouncilContext, run: str | None, whole: bool) -> None:
    """List the checkpoints of this project, oldest first.

    \b
    Examples:
      council checkpoint list
      council checkpoint list --run 20260102-030405-ab12
    """
    _check_scope(run, whole=whole)
    council = context.council
    found = await council.checkpoints.list(WHOLE_STORE if whole else run)
    if run is not None and not found:  # checkpoints remain when the record of their run is removed
        found = await council.checkpoints.list(await council.runs.find(run))
    lines = (
        line
        for one in found
        for line in wrapped(
            printable(f"{one.status or '-'}: {_task_counts(one)}; {one.reason}"),
            head=f"{one.id:<24} {format_local_time(one.time)}  ",
            indent="    ",
        )
    )
    context.output.answer(
        lambda: {"checkpoints": [_facts(one) for one in found]}, lines if found else ["no checkpoints"]
    )


@checkpoint.command()
@_id_argument
@run_option
@council_command()
async def show(context: CouncilContext, checkpoint_id: str, run: str | None) -> None:
    """Show a checkpoint, and the changes that restoring it would make.

    CHECKPOINT is an id from `council checkpoint list`, or a number for the newest run.

    \b
    Examples:
      council checkpoint show 3
      council checkpoint show all/1
    """
    found = await context.council.checkpoints.plan_restore(await _full_id(context.council, checkpoint_id, run))
    context.output.answer(lambda: {**_facts(found.checkpoint), **_changes(found)}, _lines(found))


@checkpoint.command()
@_id_argument
@click.option("--force", is_flag=True, help="Take over the run if a process is active in it.")
@run_option
@council_command()
async def restore(context: CouncilContext, checkpoint_id: str, force: bool, run: str | None) -> None:
    """Restore a checkpoint, from which `council resume` continues.

    Landed work stays landed. The work of later sessions stays in their logs and in `council salvage`. The current state
    becomes a checkpoint first.

    \b
    Examples:
      council checkpoint restore 3
      council checkpoint restore 20260102-030405-ab12/3 --force
    """
    done = await context.council.checkpoints.restore(await _full_id(context.council, checkpoint_id, run), force=force)
    context.output.answer(lambda: {**asdict(done), "skipped": _skipped_documents(done.skipped)}, _restored(done))


def _restored(done: RestoreResult) -> Iterator[str]:
    for name, why in done.skipped.items():
        yield f"{name} is unchanged: {why}"
    if not done.written and not done.deleted:
        yield "nothing to restore: the state is the same"
    else:
        before = f"the previous state is checkpoint {done.before}" if done.before else "there was no previous state"
        yield f"restored {done.checkpoint}; {before}"
        if not done.runs:
            yield "the run has ended: there is nothing to resume"
    for run in done.runs:
        yield f"`council resume {run}` continues it"


def _check_scope(run: str | None, *, whole: bool) -> None:
    if run is not None and whole:
        raise click.UsageError("--run and --all cannot be combined.")


async def _full_id(council: Council, name: str, run: str | None) -> str:
    named, _, number = name.rpartition("/")
    if named == WHOLE_STORE:
        return name
    try:
        return f"{await council.runs.find(named or run)}/{number}"
    except RefusedError:
        if not named:
            raise
        return name  # the record of its run may have been removed


def _facts(one: Checkpoint) -> JsonObject:
    return {"id": one.id, "run": one.run, **one.model_dump(mode="json"), "number": one.number}


def _changes(found: RestorePlan) -> JsonObject:
    return {
        "written": [str(key) for key in found.written],
        "deleted": [str(key) for key in found.deleted],
        "skipped": _skipped_documents({str(key): why for key, why in found.skipped.items()}),
    }


def _skipped_documents(left: Mapping[str, str]) -> list[JsonObject]:
    return [{"document": name, "reason": why} for name, why in left.items()]


def _task_counts(one: Checkpoint) -> str:
    labels = {status.value: status.record.label for status in TaskStatus}
    return ", ".join(f"{count} {labels.get(status, status)}" for status, count in one.task_counts.items())


def _lines(found: RestorePlan) -> Iterator[str]:
    one = found.checkpoint
    yield f"{one.id}  {format_local_time(one.time)}  position {one.position}  {one.status or '-'}"
    yield f"created by {one.created_by}: {one.reason}"
    yield f"tasks: {_task_counts(one)}"
    for session in one.sessions:
        yield f"active: {session.run}/{session.task}, session {session.attempt}, {session.status}"
    yield from (f"would be restored: {key}" for key in found.written)
    yield from (f"would be deleted: {key}" for key in found.deleted)
    yield from (f"would stay unchanged: {key}: {why}" for key, why in found.skipped.items())
    if not found.writes:
        yield "restoring it would change nothing"
