"""Commands that copy, export and import a complete store."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import click
from anyio import to_thread

from orchestrator.api.transfer import copy_state, import_store, open_target
from orchestrator.cli.core.command import (
    CommandContext,
    CouncilContext,
    async_command,
    council_command,
    explicit_store_url,
    open_council,
    store_option,
)
from orchestrator.cli.render.output import Output
from orchestrator.cli.render.text import printable
from orchestrator.cli.streams import redirect_to_null
from orchestrator.domain.settings.quantities import format_size_short
from orchestrator.errors import CouncilError, RefusedError
from orchestrator.project import Project, exclude_from_git, find_project
from orchestrator.repo.git.command import Git
from orchestrator.repo.source.user_checkouts import find_repository

if TYPE_CHECKING:
    from orchestrator.protocols import JsonObject
    from orchestrator.state.transfer.copying import CopyResult

#: The maximum number of unreadable documents that are listed.
_MOST_NAMED: Final = 5
#: The file name that means standard input or output.
_STREAM: Final = Path("-")
_file = click.argument("file", metavar="FILE", type=click.Path(path_type=Path, allow_dash=True))


@click.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@async_command()
async def copy(context: CommandContext, source: str, target: str) -> None:
    """Copy a store with its complete history into an empty one.

    FROM and TO are URLs of stores, or folders. FROM may have an active run: the copy is a consistent snapshot. The two
    stores are compared after the copy.

    \b
    Examples:
      council state copy .council/state /backup/state
      council state copy file:///home/ada/shop/.council/state file:///backup/state --json
    """
    copied = await copy_state(source, target)
    _print_result(context.output, copied, "already copied:" if copied.already_present else "copied")


@click.command()
@_file
@click.option("--force", is_flag=True, help="Replace an existing FILE.")
@council_command()
async def export(context: CouncilContext, file: Path, force: bool) -> None:
    """Write the complete state to a file.

    The file contains compressed JSON lines, which `zstdcat FILE` prints. With -, writes to standard output, and prints
    messages to standard error. A run may be active.

    \b
    Examples:
      council state export state.jsonl.zst
      council state export - > state.jsonl.zst
    """
    is_stream, state = file == _STREAM, context.council.state
    if is_stream and sys.stdout.isatty():
        raise RefusedError(
            "an export is binary, but standard output is a terminal",
            "specify a file, or redirect the output, for example `- > FILE`",
        )
    try:
        copied = await state.export_to(sys.stdout.buffer if is_stream else file, force=force)
    except BrokenPipeError:
        redirect_to_null(sys.stdout)
        raise RefusedError("the reader of the export has exited", "check why it ended") from None
    _print_result(context.output, copied, "exported", err=is_stream)


@click.command("import")
@_file
@store_option
@async_command()
async def import_(context: CommandContext, file: Path) -> None:
    """Import an exported file into an empty store.

    Positions, times and versions are the same as in the original. An incomplete file is not imported at all. - is
    standard input.

    \b
    Examples:
      council state import state.jsonl.zst
      council state import state.jsonl.zst --state .council/state
      council state import - --json
    """
    if file == _STREAM and sys.stdin.isatty():
        raise RefusedError(
            "standard input is a terminal", "specify a file, or redirect the input, for example `- < FILE`"
        )
    copied = await _import(context, sys.stdin.buffer if file == _STREAM else file)
    _print_result(context.output, copied, "already imported:" if copied.already_present else "imported")


async def _import(context: CommandContext, file: Path | IO[bytes]) -> CopyResult:
    if place := explicit_store_url():
        async with open_target(place) as found:
            copied = await import_store(file, found)
        await _exclude(found.local_paths())
        return copied
    try:
        find_project(Path())
    except RefusedError as error:
        remedy = "cd to the root of the repository, and select its store: `--state .council/state`"
        raise RefusedError(error.message, remedy) from None
    async with open_council(context) as opened:
        return await opened.council.state.import_from(file)


async def _exclude(paths: Sequence[Path]) -> None:
    """Make git ignore a project's own store, as the first run in the project does."""
    folder = next(iter(paths), None)
    if folder is None or folder != Project(folder.parent.parent).state_folder:
        return
    with suppress(CouncilError, OSError):  # a folder without a repository needs no exclusion
        repository = await find_repository(folder.parent.parent, Git(None, as_user=True, environ=os.environ))
        await to_thread.run_sync(exclude_from_git, repository.git_dir)


def _print_result(output: Output, copied: CopyResult, verb: str, *, err: bool = False) -> None:
    if output.as_json:
        line = json.dumps(_copied_json(copied))
    else:
        file_size = ""
        if copied.file_bytes is not None and copied.compression_ratio is not None:
            file_size = f", file size {format_size_short(copied.file_bytes)} ({copied.compression_ratio:.0f}x smaller)"
        documents = f"{copied.documents:,} {'document' if copied.documents == 1 else 'documents'}"
        line = f"{verb} {copied.commits:,} commits, {documents}, {format_size_short(copied.bytes)}{file_size}"
    output.text(f"{line}\n", err=err)
    for warning in () if output.as_json else _warnings(copied):
        output.text(f"{warning}\n", err=True)


def _warnings(copied: CopyResult) -> Iterator[str]:
    """Yield warnings about unreadable documents, as printable text."""
    found = list(copied.unreadable.items())
    for key, flaw in found[:_MOST_NAMED]:
        yield printable(f"warning: {key} can't be read: {flaw}")
    if len(found) > _MOST_NAMED:
        yield f"warning: {len(found) - _MOST_NAMED} more can't be read"
    if found:
        yield "`council state verify --repair` restores their last readable versions"


def _copied_json(copied: CopyResult) -> JsonObject:
    return {
        "position": copied.position,
        "first": copied.first,
        "commits": copied.commits,
        "documents": copied.documents,
        "bytes": copied.bytes,
        "file_bytes": copied.file_bytes,
        "compression_ratio": None if copied.compression_ratio is None else round(copied.compression_ratio, 2),
        "already_present": copied.already_present,
        "unreadable": {str(key): flaw for key, flaw in copied.unreadable.items()},
    }
