"""Commands that list and resolve conflicts of updates."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
import click
import orjson

from orchestrator.cli.core.command import CouncilContext, council_command
from orchestrator.cli.render.documents import field_changes, field_lines
from orchestrator.errors import RefusedError
from orchestrator.protocols import Document, JsonObject
from orchestrator.system.clock import format_local_time

if TYPE_CHECKING:
    from orchestrator.state.documents.conflicts import Conflict


@click.command()
@council_command(is_short_lived=True)
async def conflicts(context: CouncilContext) -> None:
    """List unresolved conflicts of updates, oldest first.

    Shows the id of each conflict, the document, and the candidates: time, writer, and changes to the current document.
    `council state resolve` chooses one of them.

    \b
    Examples:
      council state conflicts
      council state conflicts --json
    """
    council = context.council
    found = await council.state.conflicts()
    now = await council.history.at(await council.history.position())
    pairs = [(one, now.documents.get(one.key)) for one in found]
    lines = (line for pair in pairs for line in _lines(*pair))
    context.answer_with_damage(
        lambda: {"conflicts": [_facts(*pair) for pair in pairs]}, lines if pairs else ["no conflicts"]
    )


@click.command()
@click.argument("name", metavar="CONFLICT")
@click.option("--take", metavar="N", type=click.IntRange(min=1), help="Choose the candidate with this number.")
@click.option("--value", "file", metavar="FILE", help="Use the JSON object in this file; - is standard input.")
@click.option("--force", is_flag=True, help="Resolve it even if the document has changed since the conflict.")
@council_command()
async def resolve(context: CouncilContext, name: str, take: int | None, file: str | None, force: bool) -> None:
    """Resolve a conflict with a candidate or with your own value.

    CONFLICT is an id from `council state conflicts`, or the name of the document, from which the newest run may be
    omitted.

    \b
    Examples:
      council state resolve task/models --take 2
      council state resolve 3f9ac0d1e2b45678 --value models.json
    """
    if (take is None) == (file is None):
        raise click.UsageError("use either --take or --value.")
    choice = take if file is None else await anyio.to_thread.run_sync(_read, file)
    assert choice is not None, "checked above"  # noqa: S101
    done = await context.council.state.resolve_conflict(name, choice, force=force)
    key = str(done.conflict.key)
    version, value = (None, None) if done.document is None else (done.document.version, done.document.value)
    context.output.answer(
        lambda: {"conflict": done.conflict.id, "key": key, "version": version, "value": value},
        [f"resolved: {key} is {'deleted' if version is None else f'version {version}'}"],
    )


def _read(file: str) -> JsonObject:
    named = "standard input" if file == "-" else file
    try:
        value = orjson.loads(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes())
    except OSError as error:
        raise RefusedError(
            f"{named} can't be read: {error.strerror}", "use a file that contains a JSON object"
        ) from None
    except orjson.JSONDecodeError as error:
        raise RefusedError(
            f"{named} is not valid JSON: {error}", "write the complete document as a JSON object"
        ) from None
    if not isinstance(value, dict):
        raise RefusedError(f"{named} is not a JSON object", "write the complete document as a JSON object")
    return value


def _facts(one: Conflict, now: Document | None) -> JsonObject:
    candidates = [
        {
            "number": number,
            "time": candidate.time,
            "writer": candidate.writer,
            "base": candidate.base,
            "value": candidate.value,
            "fields": field_changes(now.value if now else None, candidate.value),
        }
        for number, candidate in enumerate(one.candidates, 1)
    ]
    version = now.version if now else None
    return {
        "id": one.id,
        "key": str(one.key),
        "version": one.version,
        "current_version": version,
        "candidates": candidates,
    }


def _lines(one: Conflict, now: Document | None) -> Iterator[str]:
    version = now.version if now else 0
    since = "" if version == one.version else f", now version {version}" if version else ", now deleted"
    yield f"{one.id}  {one.key}  version {one.version}{since}"
    for number, candidate in enumerate(one.candidates, 1):
        yield f"  {number}  {format_local_time(candidate.time)}  {candidate.writer}"
        if candidate.value is None:
            yield "       deleted"
            continue
        changed = field_lines(now.value if now else None, candidate.value)
        yield from (f"       {line}" for line in changed or ["no changes"])
