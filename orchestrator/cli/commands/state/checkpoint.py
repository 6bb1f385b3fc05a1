"""Commands that save, show and restore checkpoints of runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial

import click

from orchestrator.api.council import Council
from orchestrator.cli.core.command import (
    CommandContext,
    json_option,
    open_council,
    run_command,
    run_option,
    store_option,
)
from orchestrator.cli.core.completion import complete_checkpoints
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.render.text import printable
from orchestrator.errors import RefusedError
from orchestrator.protocols import JsonObject
from orchestrator.state.documents.checkpoints import WHOLE_STORE, Checkpoint, RestorePlan
from orchestrator.system.instants import format_local_time

_all_option = click.option("--all", "whole", is_flag=True, help="A checkpoint of all runs together.")
_id_argument = click.argument("checkpoint_id", metavar="CHECKPOINT", shell_complete=complete_checkpoints)


@click.group(cls=SuggestingGroup)
def checkpoint() -> None:
    """Save and restore checkpoints of a run.

    An active run creates a checkpoint every five minutes and keeps the newest twelve. `cancel`, `clean` and `restore`
    create one before they start. A checkpoint can be restored while the state log has its position.

    \b
    Examples:
      council checkpoint create --reason "before the big merge"
      council checkpoint show 3
      council checkpoint restore 3
    """


@checkpoint.command()
@click.option("--reason", metavar="TEXT", default="manual", help="The reason for the checkpoint.")
@run_option
@_all_option
@store_option
@json_option
def create(reason: str, run: str | None, whole: bool, as_json: bool) -> None:
    """Create a checkpoint of the current state of a run; default: the newest.

    \b
    Examples:
      council checkpoint create
      council checkpoint create --all --reason "before the upgrade"
    """
    _check_scope(run, whole=whole)

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            made = await council.checkpoints.create(run, reason=reason, whole=whole)
            if as_json:
                context.output.json(_facts(made))
            else:
                context.output.text(f"created checkpoint {made.id}\n")
            return 0

    run_command(command, as_json=as_json)


@checkpoint.command("list")
@partial(run_option, words="Only those of this run.")
@click.option("--all", "whole", is_flag=True, help="List only checkpoints of all runs together.")
@store_option
@json_option
def list_checkpoints(run: str | None, whole: bool, as_json: bool) -> None:
    """List the checkpoints of this project, oldest first.

    \b
    Examples:
      council checkpoint list
      council checkpoint list --run 20260102-030405-ab12
    """
    _check_scope(run, whole=whole)

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            found = await council.checkpoints.list(WHOLE_STORE if whole else run)
            if run is not None and not found:  # of a run whose record was removed they are listed all the same
                found = await council.checkpoints.list(await council.runs.find(run))
            if as_json:
                context.output.json({"checkpoints": [_facts(one) for one in found]})
            elif not found:
                context.output.text("no checkpoints\n")
            for one in [] if as_json else found:
                told = (
                    f"{one.id:<24} {format_local_time(one.time)}  {one.status or '-':<12} {_phase(one)}  {one.reason}"
                )
                context.output.text(printable(told) + "\n")
            return 0

    run_command(command, as_json=as_json, brief=True)


@checkpoint.command()
@_id_argument
@run_option
@store_option
@json_option
def show(checkpoint_id: str, run: str | None, as_json: bool) -> None:
    """Show a checkpoint, and the changes that restoring it would make.

    CHECKPOINT is an id from `council checkpoint list`, or a number for the newest run.

    \b
    Examples:
      council checkpoint show 3
      council checkpoint show all/1
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            found = await council.checkpoints.plan_restore(await _full_id(council, checkpoint_id, run))
            if as_json:
                context.output.json({**_facts(found.checkpoint), **_changes(found)})
            for line in () if as_json else _lines(found):
                context.output.text(printable(line) + "\n")
            return 0

    run_command(command, as_json=as_json)


@checkpoint.command()
@_id_argument
@click.option("--force", is_flag=True, help="Take over a run that is active in a process.")
@run_option
@store_option
@json_option
def restore(checkpoint_id: str, force: bool, run: str | None, as_json: bool) -> None:
    """Restore a checkpoint, from which `council resume` continues.

    Landed work stays landed. The work of later sessions stays in their logs and in `council salvage`. The current state
    becomes a checkpoint first.

    \b
    Examples:
      council checkpoint restore 3
      council checkpoint restore 20260102-030405-ab12/3 --force
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            done = await council.checkpoints.restore(await _full_id(council, checkpoint_id, run), force=force)
            if as_json:
                context.output.json({**asdict(done), "left": _skipped_documents(done.left)})
                return 0
            for name, why in done.left.items():
                context.output.text(printable(f"{name} is unchanged: {why}") + "\n")
            before = f"the previous state is checkpoint {done.before}" if done.before else "there was no previous state"
            told = f"restored {done.checkpoint}; {before}"
            if not done.written and not done.deleted:
                told = "nothing to restore: the state is the same"
            elif not done.runs:
                told += "\nthe run had ended then: there is nothing to resume"
            context.output.text(f"{told}\n")
            for one in done.runs:
                context.output.text(f"`council resume {one}` continues it\n")
            return 0

    run_command(command, as_json=as_json)


def _check_scope(run: str | None, *, whole: bool) -> None:
    if run is not None and whole:
        raise click.UsageError("--run and --all exclude each other.")


async def _full_id(council: Council, name: str, run: str | None) -> str:
    named, _, number = name.rpartition("/")
    if named == WHOLE_STORE:
        return name
    try:
        return f"{await council.runs.find(named or run)}/{number}"
    except RefusedError:
        if not named:
            raise
        return name  # its run's record was removed, perhaps


def _facts(one: Checkpoint) -> JsonObject:
    return {**asdict(one), "number": one.number}


def _changes(found: RestorePlan) -> JsonObject:
    return {
        "written": [str(key) for key in found.written],
        "deleted": [str(key) for key in found.deleted],
        "left": _skipped_documents({str(key): why for key, why in found.left.items()}),
    }


def _skipped_documents(left: Mapping[str, str]) -> list[JsonObject]:
    return [{"document": name, "reason": why} for name, why in left.items()]


def _phase(one: Checkpoint) -> str:
    return ", ".join(f"{count} {status}" for status, count in one.phase.items())


def _lines(found: RestorePlan) -> Iterable[str]:
    one = found.checkpoint
    yield f"{one.id}  {format_local_time(one.time)}  position {one.position}  {one.status or '-'}"
    yield f"made by {one.maker}: {one.reason}"
    yield f"tasks: {_phase(one)}"
    for session in one.sessions:
        yield f"active: {session.run}/{session.task}, session {session.attempt}, {session.status}"
    yield from (f"would be restored: {key}" for key in found.written)
    yield from (f"would be deleted: {key}" for key in found.deleted)
    yield from (f"would stay unchanged: {key}: {why}" for key, why in found.left.items())
    if not found.writes:
        yield "restoring it would change nothing"
