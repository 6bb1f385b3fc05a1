"""The commands that list and delete recorded results of checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from orchestrator.api.topics.checks import RecordedCheck
from orchestrator.cli.core.command import CouncilContext, council_command
from orchestrator.cli.core.group import SuggestingGroup
from orchestrator.cli.render.text import align_columns, one_line, pluralize, printable
from orchestrator.system.clock import format_local_time

#: The number of characters shown of a digest and of a command.
_SHORT_DIGEST, _MAX_COMMAND = 12, 60


@click.group(cls=SuggestingGroup)
def checks() -> None:
    """List or delete recorded results of checks.

    A check that passed is not repeated on the same files by any task, run or machine, for seven days.

    \b
    Examples:
      council checks list
      council checks forget --command "make test"
    """


@checks.command("list")
@council_command()
async def list_checks(context: CouncilContext) -> None:
    """List recorded results of checks, oldest first.

    Shows the digest, the command, the commit whose files passed, the duration, the task, the host and the time.

    \b
    Examples:
      council checks list
      council checks list --json
    """
    found = await context.council.checks.list()
    lines = _lines(found) if found else ["no recorded checks"]
    context.answer_with_damage(lambda: {"checks": [one.to_json() for one in found]}, lines)


@checks.command()
@click.argument("digests", metavar="[all | DIGEST...]", nargs=-1)
@click.option("--command", metavar="TEXT", help="Only the results of this command.")
@council_command()
async def forget(context: CouncilContext, digests: tuple[str, ...], command: str | None) -> None:
    """Delete recorded results, so that the checks run again.

    DIGEST is the beginning of a digest from `council checks list`.

    \b
    Examples:
      council checks forget all
      council checks forget 3f9ac0d1e2b4
      council checks forget --command "make test"
    """
    if not digests and command is None:
        raise click.UsageError("use `all`, a DIGEST or --command.")
    named = () if digests == ("all",) else digests
    deleted = await context.council.checks.forget(*named, command=command)
    context.output.answer(
        lambda: {"forgotten": [one.to_json() for one in deleted]},
        [f"deleted {pluralize(len(deleted), 'recorded check')}"],
    )


def _lines(found: Sequence[RecordedCheck]) -> Iterator[str]:
    rows = []
    for one in found:
        record = one.record
        outcome = "" if record.failed_log is None else " FLAKY"
        rows.append(
            [
                one.digest[:_SHORT_DIGEST],
                printable(one_line(record.command, _MAX_COMMAND)),
                f"{record.commit[:10]}{outcome}",
                f"{record.seconds:.1f} s",
                printable(f"{record.task} of {record.run}"),
                f"on {printable(record.host)}",
                format_local_time(record.ended),
            ]
        )
    yield from align_columns(rows)
