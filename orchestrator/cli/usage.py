"""The command that tells what a run used up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from orchestrator.cli.columns import aligned
from orchestrator.cli.command import Context, json_option, opened, perform, run_argument, store_option

if TYPE_CHECKING:
    from orchestrator.domain.usage import RunUsage, Usage


@click.command()
@run_argument
@store_option
@json_option
def usage(run: str | None, as_json: bool) -> None:
    """Tell what a run used up, by adapter and by task.

    That is the time of its sessions, tokens and US dollars, as far as the CLIs told. Without RUN it is the newest.

    \b
    Examples:
      council usage
      council usage 20260102-030405-ab12 --json
    """

    async def command(context: Context) -> int:
        async with opened(context.log) as council:
            found = await council.past.usage(run or await council.past.runs.newest())
            if as_json:
                context.output.json(asdict(found))
            else:
                for line in aligned(list(_rows(found))):
                    context.output.text(f"{line}\n")
            return 0

    perform(command, as_json=as_json, brief=True)


def _rows(found: RunUsage) -> Iterator[list[str]]:
    yield ["", "sessions", "minutes", "tokens in", "tokens out", "cost"]
    for name, one in found.adapters.items():
        yield [f"adapter {name}", *_cells(one)]
    for name, one in found.tasks.items():
        yield [f"task {name}", *_cells(one)]
    yield [f"run {found.run}", *_cells(found.total)]


def _cells(one: Usage) -> list[str]:
    unknown = "" if one.priced == one.sessions else f" (of {one.priced} of {one.sessions} sessions)"
    cost = "not told" if one.cost is None else f"${one.cost:.4f}{unknown}"
    return [str(one.sessions), f"{one.seconds / 60:.1f}", f"{one.input_tokens:,}", f"{one.output_tokens:,}", cost]
