"""Commands that read the state log: documents, differences, versions, commits."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from functools import partial
from typing import Final

import click

from orchestrator.api.council import Council
from orchestrator.api.topics.history import StateHistory, is_about_run
from orchestrator.cli.core.command import CouncilContext, council_command, run_argument, run_option
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
from orchestrator.cli.render.run_summary import run_summary_lines
from orchestrator.domain.settings.quantities import parse_duration
from orchestrator.errors import RefusedError
from orchestrator.protocols import VERSIONS_KEPT, CommitRecord, DocumentVersion, Key

_of_run = partial(run_option, words="Only documents of this run.")


async def _find_run(council: Council, run: str | None) -> str | None:
    """Return the full id of a run, even of a removed one; None for None.

    Raises RefusedError if it is unknown.
    """
    return run if run is None or await council.history.versions(Key("run", run), 1) else await council.runs.find(run)


@click.command()
@click.argument("point", metavar="POINT")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@_of_run
@council_command(is_short_lived=True)
async def at(context: CouncilContext, point: str, keys: tuple[str, ...], run: str | None) -> None:
    """Show the documents at a point in time.

    Without KEY, lists them; with KEY, prints their values. A key is kind/id. The newest run may be omitted from it, and
    * matches any characters.

    \b
    Examples:
      council state at 2026-01-02T03:04
      council state at 2h task/models
      council state at 120 'task/*' --json
    """
    past = context.council.history
    position, only = await _resolve_position(past, point), await _find_run(context.council, run)
    found = await past.at(position, run=only, names=keys)
    context.answer_with_damage(lambda: state_json(found), state_lines(found, with_values=bool(keys)))


@click.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="[B]", default="now")
@_of_run
@council_command(is_short_lived=True)
async def diff(context: CouncilContext, before: str, after: str, run: str | None) -> None:
    """Show the changed fields between two points in time.

    B defaults to now.

    \b
    Examples:
      council state diff 2h
      council state diff 120 140 --run 20260102-030405-ab12
    """
    past, only = context.council.history, await _find_run(context.council, run)
    old, new = [await past.at(await _resolve_position(past, one), run=only) for one in (before, after)]
    context.answer_with_damage(lambda: differences_json(old, new), difference_lines(old, new))


@click.command()
@click.argument("key", metavar="KEY")
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), default=VERSIONS_KEPT, help="The maximum number of versions."
)
@council_command(is_short_lived=True)
async def history(context: CouncilContext, key: str, limit: int) -> None:
    """Show the versions of a document, newest first.

    Shows the writer and time of each version, its events, and the changed fields. KEY is kind/id; the newest run may be
    omitted from it.

    \b
    Examples:
      council state history task/models
      council state history run/20260102-030405-ab12 --limit 3 --json
    """
    found = await context.council.history.key(key)
    # One more, to compare the oldest of them with.
    versions = await context.council.history.versions(found, limit + 1)
    before: list[DocumentVersion | None] = [*versions[1:], None]
    pairs = list(zip(versions, before, strict=True))[:limit]
    context.answer_with_damage(lambda: history_json(found, pairs), history_lines(found, pairs))


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Continue with new commits until Ctrl-C.")
@click.option(
    "--after", metavar="POSITION", type=click.IntRange(min=0), default=0, help="Only commits after this position."
)
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Only the newest N commits.")
@_of_run
@council_command()
async def log(context: CouncilContext, follow: bool, after: int, limit: int | None, run: str | None) -> None:
    """Print the commits of the log, oldest first.

    One line each: position, time, writer, events, and written documents.

    \b
    Examples:
      council state log --limit 20
      council state log --follow --run 20260102-030405-ab12
      council state log --after 120 --json
    """
    council, output, lines = context.council, context.output, CommitFormatter()
    only = await _find_run(council, run)
    async with aclosing(_commits(council, only, after=after, limit=limit, follow=follow)) as commits:
        async for record in commits:
            if output.as_json:
                output.json(commit_json(record))
            else:
                output.text(f"{lines.line(record)}\n")
            if output.is_reader_gone:
                break
    context.print_damage()


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
@council_command(is_short_lived=True)
async def show(context: CouncilContext, run: str | None) -> None:
    """Show a summary of a run, with its newest events.

    RUN defaults to the newest run.

    \b
    Examples:
      council state show
      council state show 20260102-030405-ab12 --json
    """
    found = await context.council.reports.summary(run)
    context.answer_with_damage(found.to_json, run_summary_lines(found))


@click.command()
@click.option("--repair", is_flag=True, help="Restore the newest readable values of damaged documents.")
@council_command()
async def verify(context: CouncilContext, repair: bool) -> int:
    """Verify the integrity of the complete state.

    The exit code is 1 if it is damaged. --repair restores the newest known value of each damaged document, and moves
    damaged parts of the log aside.

    \b
    Examples:
      council state verify
      council state verify --repair --json
    """
    council = context.council
    found = await council.state.verify()
    repaired: list[RepairedDocument] = []
    if repair and not found.is_valid:
        begin, found = found.position, await council.state.repair()
        limit = max(found.position - begin, 1)
        commits = await council.history.newest_commits(limit, after=begin, until=found.position)
        repaired = repaired_documents(commits)
    context.output.answer(lambda: verification_json(found, repaired), verification_lines(found, repaired))
    return 0 if found.is_valid else 1


_POSITION: Final = re.compile(r"[0-9]{1,18}")
_CHECKPOINT: Final = re.compile(r"[^/]+/[0-9]+")
_LONGEST_AGE: Final = 100 * 366 * 86400.0  # seconds
_REMEDY: Final = (
    "write a position such as 120, a time such as 2026-01-02T03:04, an age such as 2h, the id of a checkpoint, or now"
)


async def _resolve_position(past: StateHistory, text: str) -> int:
    """Return the position of a point in time. Raises RefusedError for other text."""
    if text == "now":
        return await past.position()
    if _POSITION.fullmatch(text):
        return int(text)
    instant = parse_instant(text, time.time())
    if instant is not None:
        return await past.position_at(instant)
    found = await past.position_of(text)
    if found is None and _CHECKPOINT.fullmatch(text):
        raise RefusedError(f"there is no checkpoint {text!r}", "`council checkpoint list` lists them")
    if found is None:
        raise RefusedError(f"{text!r} is not a point in time", _REMEDY)
    return found


def parse_instant(text: str, now: float) -> float | None:
    """Parse an ISO 8601 time or an age before `now`; return None for other text.

    Returns wall-clock seconds. A time without a zone is local time.
    """
    try:
        return now - parse_duration(text.removesuffix("ago").rstrip(), longest=_LONGEST_AGE)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None
