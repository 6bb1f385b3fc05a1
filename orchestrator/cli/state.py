"""Commands that look at what is recorded, now and at any earlier moment. None of them changes anything."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing

import click

from orchestrator.cli.columns import aligned
from orchestrator.cli.command import Context, json_option, opened, perform, run_argument, store_option
from orchestrator.cli.commits import CommitLines, commit_json, event_name, events_json
from orchestrator.cli.completing import complete_runs
from orchestrator.cli.differences import field_changes, field_lines
from orchestrator.cli.group import Suggesting
from orchestrator.cli.moment import find_position
from orchestrator.cli.output import local_time, plain
from orchestrator.cli.overview import overview_lines
from orchestrator.council import Council
from orchestrator.past import Past, concerns_run
from orchestrator.protocols import HISTORY, Document, JsonObject, Key, Record, State, Version

_of_run = click.option("--run", "run", metavar="RUN", help="Only what is of this run.", shell_complete=complete_runs)


@click.group(cls=Suggesting)
def state() -> None:
    """See what is recorded, now and at any earlier moment.

    A moment is a position of the log, a time (2026-01-02T03:04), how long ago (2h), a checkpoint's id, or now.

    \b
    Examples:
      council state log --limit 20
      council state at 2h
      council state history task/models
    """


def _look(
    store: str | None, answer: Callable[[Past], Awaitable[tuple[JsonObject, Iterator[str]]]], *, as_json: bool
) -> None:
    """Perform a command that prints one object, or what its lines are for people."""

    async def command(context: Context) -> int:
        async with opened(context.log, store=store) as council:
            told, lines = await answer(council.past)
            if as_json:
                context.output.json(told | {"damage": list(council.damage)})
                return 0
            for line in lines:
                context.output.text(f"{line}\n")
            _tell_damage(context, council)
            return 0

    perform(command, as_json=as_json, brief=True)


def _tell_damage(context: Context, council: Council) -> None:
    for place in council.damage:
        context.output.notice(plain(f"The state log is damaged: {place}"))


async def _check_run(past: Past, run: str | None) -> None:
    """Refuse a run that was never recorded."""
    if run is not None:
        await past.key(f"run/{run}")


@state.command()
@click.argument("moment", metavar="MOMENT")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@_of_run
@store_option
@json_option
def at(moment: str, keys: tuple[str, ...], run: str | None, store: str | None, as_json: bool) -> None:
    """Show the documents as they were at a moment.

    Without KEY they are listed; with KEY their values are printed. A key is kind/id, in which the newest run may be
    left out, and * stands for any characters.

    \b
    Examples:
      council state at 2026-01-02T03:04
      council state at 2h task/models
      council state at 120 'task/*' --json
    """

    async def answer(past: Past) -> tuple[JsonObject, Iterator[str]]:
        await _check_run(past, run)
        found = await past.at(await find_position(past, moment), run=run, names=keys)
        documents = [_document_json(one) for one in _sorted(found)]
        told = {"position": found.position, "time": _time(found), "documents": documents}
        return told, _state_lines(found, with_values=bool(keys))

    _look(store, answer, as_json=as_json)


def _sorted(found: State) -> list[Document]:
    return [found.documents[key] for key in sorted(found.documents)]


def _time(found: State) -> float | None:
    return found.time if found.position else None


def _document_json(one: Document) -> JsonObject:
    return {
        "key": str(one.key),
        "version": one.version,
        "position": one.position,
        "time": one.time,
        "by": one.by,
        "expires": one.expires,
        "damaged": one.damaged,
        "value": one.value,
    }


def _moment(found: State) -> str:
    return f"position {found.position}, {local_time(found.time)}" if found.position else "position 0, an empty store"


def _state_lines(found: State, *, with_values: bool) -> Iterator[str]:
    documents = _sorted(found)
    yield f"{_moment(found)}: {len(documents)} {'document' if len(documents) == 1 else 'documents'}"
    rows = aligned([_row(one) for one in documents], "  ")
    for one, row in zip(documents, rows, strict=True):
        yield row
        if with_values:
            text = json.dumps(one.value, indent=2, ensure_ascii=False)
            yield from (f"    {plain(line)}" for line in text.split("\n"))


def _row(one: Document) -> list[str]:
    damaged = ["damaged: an older value"] if one.damaged else []
    return [str(one.key), f"version {one.version}", f"position {one.position}", local_time(one.time), one.by, *damaged]


@state.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="[B]", default="now")
@_of_run
@store_option
@json_option
def diff(before: str, after: str, run: str | None, store: str | None, as_json: bool) -> None:
    """Show what differs between two moments, field by field.

    Without B the other one is now.

    \b
    Examples:
      council state diff 2h
      council state diff 120 140 --run 20260102-030405-ab12
    """

    async def answer(past: Past) -> tuple[JsonObject, Iterator[str]]:
        await _check_run(past, run)
        old, new = [await past.at(await find_position(past, one), run=run) for one in (before, after)]
        changed = _changed(old, new)
        told = {
            "from": {"position": old.position, "time": _time(old)},
            "to": {"position": new.position, "time": _time(new)},
            "documents": [_difference_json(*one) for one in changed],
        }
        return told, _difference_lines(old, new, changed)

    _look(store, answer, as_json=as_json)


_Pair = tuple[Document | None, Document | None]


def _changed(old: State, new: State) -> list[_Pair]:
    keys = sorted({*old.documents, *new.documents})
    pairs = [(old.documents.get(key), new.documents.get(key)) for key in keys]
    return [(one, other) for one, other in pairs if _version(one) != _version(other)]


def _version(one: Document | None) -> int | None:
    return None if one is None else one.version


def _value(one: Document | None) -> JsonObject | None:
    return None if one is None else one.value


def _key(old: Document | None, new: Document | None) -> Key:
    found = old or new
    assert found is not None  # noqa: S101  one of them is there
    return found.key


def _kind(old: Document | None, new: Document | None) -> str:
    if old is None:
        return "added"
    return "removed" if new is None else "changed"


def _difference_json(old: Document | None, new: Document | None) -> JsonObject:
    return {
        "key": str(_key(old, new)),
        "kind": _kind(old, new),
        "old_version": _version(old),
        "new_version": _version(new),
        "fields": field_changes(_value(old), _value(new)),
    }


def _difference_lines(old: State, new: State, changed: Sequence[_Pair]) -> Iterator[str]:
    yield f"from {_moment(old)}"
    yield f"to   {_moment(new)}"
    rows = [
        [_kind(*pair), str(_key(*pair)), f"version {' → '.join(str(one.version) for one in pair if one is not None)}"]
        for pair in changed
    ]
    for (one, other), row in zip(changed, aligned(rows), strict=True):
        yield row
        if one is not None and other is not None:
            yield from (f"    {line}" for line in field_lines(one.value, other.value))
    if not changed:
        yield "nothing differs"


@state.command()
@click.argument("key", metavar="KEY")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), default=HISTORY, help="At most so many versions.")
@store_option
@json_option
def history(key: str, limit: int, store: str | None, as_json: bool) -> None:
    """Show the versions of a document, the newest first.

    Who wrote each and when, what happened with it, and which fields changed. In KEY, kind/id, the newest run may be
    left out.

    \b
    Examples:
      council state history task/models
      council state history run/20260102-030405-ab12 --limit 3 --json
    """

    async def answer(past: Past) -> tuple[JsonObject, Iterator[str]]:
        found = await past.key(key)
        # One more, which the oldest of them is compared with.
        versions = await past.history(found, limit + 1)
        before: list[Version | None] = [*versions[1:], None]
        pairs = list(zip(versions, before, strict=True))[:limit]
        told = {"key": str(found), "versions": [_version_json(*pair) for pair in pairs]}
        return told, _history_lines(found, pairs)

    _look(store, answer, as_json=as_json)


def _version_json(one: Version, before: Version | None) -> JsonObject:
    return {
        "version": one.version,
        "position": one.position,
        "time": one.time,
        "by": one.by,
        "events": events_json(one.events),
        "deleted": one.value is None and not one.damaged,
        "damaged": one.damaged,
        "old_version": None if before is None or before.damaged else before.version,
        "old": None if before is None else before.value,
        "new": one.value,
    }


def _history_lines(key: Key, pairs: Sequence[tuple[Version, Version | None]]) -> Iterator[str]:
    yield plain(str(key))
    rows = [
        [
            f"version {one.version}",
            f"position {one.position}",
            local_time(one.time),
            one.by,
            ", ".join(map(event_name, one.events)),
        ]
        for one, _ in pairs
    ]
    for (one, before), row in zip(pairs, aligned(rows, "  "), strict=True):
        yield row
        yield from (f"      {line}" for line in _what(one, before))


def _what(one: Version, before: Version | None) -> Sequence[str]:
    if one.damaged:
        return ["damaged: its value can't be read"]
    if one.value is None:
        return ["deleted"]
    if before is None and one.version > 1:
        return ["the version before is no longer kept"]
    if before is not None and before.damaged:
        return ["the version before can't be read"]
    return field_lines(before.value if before else None, one.value) or ["written again, nothing changed"]


@state.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what is committed, until Ctrl-C.")
@click.option("--after", metavar="POSITION", type=click.IntRange(min=0), default=0, help="Only what is behind it.")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Only the newest N of those that are there.")
@_of_run
@store_option
@json_option
def log(follow: bool, after: int, limit: int | None, run: str | None, store: str | None, as_json: bool) -> None:
    """Print the commits of the log, the oldest first.

    A line for each: position, time, who, what happened, and the documents that it wrote.

    \b
    Examples:
      council state log --limit 20
      council state log --follow --run 20260102-030405-ab12
      council state log --after 120 --json
    """

    async def command(context: Context) -> int:
        async with opened(context.log, store=store) as council:
            await _check_run(council.past, run)
            lines = CommitLines()
            async with aclosing(_commits(council, run, after=after, limit=limit, follow=follow)) as commits:
                async for record in commits:
                    if as_json:
                        context.output.json(commit_json(record))
                    else:
                        context.output.text(f"{lines.line(record)}\n")
                    if context.output.has_gone:
                        break
            _tell_damage(context, council)
            return 0

    perform(command, as_json=as_json)


async def _commits(
    council: Council, run: str | None, *, after: int, limit: int | None, follow: bool
) -> AsyncGenerator[Record]:
    past, until = council.past, await council.position()
    if limit is None:
        async with aclosing(past.commits(run=run, after=after, until=until)) as records:
            async for record in records:
                yield record
    else:
        for record in await past.newest_commits(limit, run=run, after=after, until=until):
            yield record
    if follow:
        async with aclosing(council.records(max(after, until))) as records:
            async for record in records:
                if run is None or concerns_run(record, run):
                    yield record


@state.command()
@run_argument
@store_option
@json_option
def show(run: str | None, store: str | None, as_json: bool) -> None:
    """Show a run at a glance: options, tasks, sessions, events and figures.

    Without RUN it is the newest.

    \b
    Examples:
      council state show
      council state show 20260102-030405-ab12 --json
    """

    async def answer(past: Past) -> tuple[JsonObject, Iterator[str]]:
        found = await past.overview(run or await past.runs.newest())
        return found.to_json(), overview_lines(found)

    _look(store, answer, as_json=as_json)
