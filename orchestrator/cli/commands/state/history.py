"""Commands that read the state log: documents at any position, differences, versions, commits, verification."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from functools import partial

import click

from orchestrator.api.council import Council
from orchestrator.api.topics.history import is_about_run
from orchestrator.cli.core.command import (
    CommandContext,
    json_option,
    open_council,
    print_damage,
    run_argument,
    run_command,
    run_option,
    store_option,
)
from orchestrator.cli.core.options import resolve_position
from orchestrator.cli.render.documents import (
    CommitFormatter,
    RepairedDocument,
    commit_json,
    difference_lines,
    differences_json,
    history_json,
    history_lines,
    repaired_documents,
    state_json,
    state_lines,
    verification_json,
    verification_lines,
)
from orchestrator.cli.render.overview import overview_lines
from orchestrator.protocols import VERSIONS_KEPT, CommitRecord, DocumentVersion, JsonObject, Key

_of_run = partial(run_option, words="Only documents of this run.")


#: A function that returns the answer as JSON, and the answer as lines.
_RenderedAnswer = tuple[Callable[[], JsonObject], Iterator[str]]


def _run_query(answer: Callable[[Council], Awaitable[_RenderedAnswer]], *, as_json: bool) -> None:
    """Execute a command that only reads."""

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            to_json, lines = await answer(council)
            if as_json:
                context.output.json(to_json() | {"damage": list(council.damage)})
                return 0
            for line in lines:
                context.output.text(f"{line}\n")
            print_damage(context, council.damage)
            return 0

    run_command(command, as_json=as_json, brief=True)


async def _find_run(council: Council, run: str | None) -> str | None:
    """Return the id of a run, even if its record was removed; None for None. RefusedError for an unknown run."""
    return run if run is None or await council.history.versions(Key("run", run), 1) else await council.runs.find(run)


@click.command()
@click.argument("moment", metavar="MOMENT")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@_of_run
@store_option
@json_option
def at(moment: str, keys: tuple[str, ...], run: str | None, as_json: bool) -> None:
    """Show the documents at a point in time.

    Without KEY lists them; with KEY prints their values. A key is kind/id. It may omit the newest run, and * matches
    any characters.

    \b
    Examples:
      council state at 2026-01-02T03:04
      council state at 2h task/models
      council state at 120 'task/*' --json
    """

    async def answer(council: Council) -> _RenderedAnswer:
        position = await resolve_position(council.history, moment)
        found = await council.history.at(position, run=await _find_run(council, run), names=keys)
        return lambda: state_json(found), state_lines(found, with_values=bool(keys))

    _run_query(answer, as_json=as_json)


@click.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="[B]", default="now")
@_of_run
@store_option
@json_option
def diff(before: str, after: str, run: str | None, as_json: bool) -> None:
    """Show the differences between two points in time, field by field.

    B defaults to now.

    \b
    Examples:
      council state diff 2h
      council state diff 120 140 --run 20260102-030405-ab12
    """

    async def answer(council: Council) -> _RenderedAnswer:
        past, only = council.history, await _find_run(council, run)
        old, new = [await past.at(await resolve_position(past, one), run=only) for one in (before, after)]
        return lambda: differences_json(old, new), difference_lines(old, new)

    _run_query(answer, as_json=as_json)


@click.command()
@click.argument("key", metavar="KEY")
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), default=VERSIONS_KEPT, help="The maximum number of versions."
)
@store_option
@json_option
def history(key: str, limit: int, as_json: bool) -> None:
    """Show the versions of a document, newest first.

    Shows the writer and time of each, its events, and the changed fields. KEY is kind/id, and may omit the newest run.

    \b
    Examples:
      council state history task/models
      council state history run/20260102-030405-ab12 --limit 3 --json
    """

    async def answer(council: Council) -> _RenderedAnswer:
        found = await council.history.key(key)
        # One more, which the oldest of them is compared with.
        versions = await council.history.versions(found, limit + 1)
        before: list[DocumentVersion | None] = [*versions[1:], None]
        pairs = list(zip(versions, before, strict=True))[:limit]
        return lambda: history_json(found, pairs), history_lines(found, pairs)

    _run_query(answer, as_json=as_json)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Continue with new commits, until Ctrl-C.")
@click.option(
    "--after", metavar="POSITION", type=click.IntRange(min=0), default=0, help="Only commits after this position."
)
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Only the newest N commits.")
@_of_run
@store_option
@json_option
def log(follow: bool, after: int, limit: int | None, run: str | None, as_json: bool) -> None:
    """Print the commits of the log, oldest first.

    One line each: position, time, writer, events, and written documents.

    \b
    Examples:
      council state log --limit 20
      council state log --follow --run 20260102-030405-ab12
      council state log --after 120 --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            only, lines = await _find_run(council, run), CommitFormatter()
            async with aclosing(_commits(council, only, after=after, limit=limit, follow=follow)) as commits:
                async for record in commits:
                    if as_json:
                        context.output.json(commit_json(record))
                    else:
                        context.output.text(f"{lines.line(record)}\n")
                    if context.output.is_reader_gone:
                        break
            print_damage(context, council.damage)
            return 0

    run_command(command, as_json=as_json)


async def _commits(
    council: Council, run: str | None, *, after: int, limit: int | None, follow: bool
) -> AsyncGenerator[CommitRecord]:
    past, until = council.history, await council.history.position()
    if limit is None:
        async with aclosing(past.commits(run=run, after=after, until=until)) as records:
            async for record in records:
                yield record
    else:
        for record in await past.newest_commits(limit, run=run, after=after, until=until):
            yield record
    if follow:
        async with aclosing(council.history.follow(max(after, until))) as records:
            async for record in records:
                if run is None or is_about_run(record, run):
                    yield record


@click.command()
@run_argument
@store_option
@json_option
def show(run: str | None, as_json: bool) -> None:
    """Show a summary of a run: options, tasks, sessions, events and metrics.

    RUN defaults to the newest run.

    \b
    Examples:
      council state show
      council state show 20260102-030405-ab12 --json
    """

    async def answer(council: Council) -> _RenderedAnswer:
        found = await council.reports.overview(run)
        return found.to_json, overview_lines(found)

    _run_query(answer, as_json=as_json)


@click.command()
@click.option("--repair", is_flag=True, help="Restore the newest readable values of damaged documents.")
@store_option
@json_option
def verify(repair: bool, as_json: bool) -> None:
    """Verify the integrity of the complete state.

    The exit code is 1 if it is damaged. --repair restores the newest known value of each damaged document, and moves
    damaged parts aside.

    \b
    Examples:
      council state verify
      council state verify --repair --json
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            found = await council.state.verify()
            settled: list[RepairedDocument] = []
            if repair and not found.is_valid:
                begin, found = found.position, await council.state.repair()
                limit = max(found.position - begin, 1)
                settled = repaired_documents(
                    await council.history.newest_commits(limit, after=begin, until=found.position)
                )
            if as_json:
                context.output.json(verification_json(found, settled))
            for line in () if as_json else verification_lines(found, settled):
                context.output.text(f"{line}\n")
            return 0 if found.is_valid else 1

    run_command(command, as_json=as_json)
