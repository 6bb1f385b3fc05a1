"""The command that shows the usage of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING

import click

from orchestrator.cli.core.command import CouncilContext, council_command, run_argument
from orchestrator.cli.render.text import align_columns, format_elapsed, short_name
from orchestrator.domain.runs.usage import Spending, compute_budget_usage
from orchestrator.domain.wording import format_cost

if TYPE_CHECKING:
    from orchestrator.domain.runs.usage import RunUsage, Usage


@click.command()
@run_argument
@council_command(is_short_lived=True)
async def usage(context: CouncilContext, run: str | None) -> None:
    """Show time, tokens and cost of a run, by adapter and by task.

    Tokens and cost (US dollars) are those that the CLIs report. If a CLI reports no cost, it is estimated from the
    price of its model, if known. RUN defaults to the newest run.

    \b
    Examples:
      council usage
      council usage 20260102-030405-ab12 --json
    """
    found = await context.council.reports.usage(run)
    context.output.answer(
        lambda: {**asdict(found), "budget": found.budget.limits, "exit": 0},
        chain(align_columns(list(_rows(found))), _notes(found)),
    )


def _rows(found: RunUsage) -> Iterator[list[str]]:
    yield ["", "sessions", "time", "tokens in", "tokens out", "cost"]
    for name, one in found.adapters.items():
        yield [f"adapter {short_name(name)}", *_cells(one)]
    for name, one in found.tasks.items():
        yield [f"task {short_name(name)}", *_cells(one)]
    yield [f"run {found.run}", *_cells(found.total)]


def _cells(one: Usage) -> list[str]:
    is_known = one.input_tokens or one.output_tokens
    tokens = [f"{one.input_tokens:,}", f"{one.output_tokens:,}"] if is_known else ["unknown"] * 2
    return [str(one.sessions), format_elapsed(one.seconds), *tokens, _cost(one)]


def _cost(one: Usage) -> str:
    if one.cost is None:
        return "unknown (tokens estimated)" if one.estimated else "unknown"
    parts = [] if one.priced == one.sessions else [f"{one.priced} of {one.sessions} sessions"]
    parts += ["estimated"] if one.estimated else []
    details = f" ({', '.join(parts)})" if parts else ""
    return f"{format_cost(one.cost)}{details}"


def _notes(found: RunUsage) -> Iterator[str]:
    total = found.total
    spent = Spending(total.input_tokens + total.output_tokens, total.cost or 0.0, total.seconds)
    for share in compute_budget_usage(found.budget, spent):
        yield f"Budget: {share.describe()}."
    if found.damaged:
        names = ", ".join(found.damaged)
        yield f"The state log is damaged: {names} may have used more; `council state verify` shows the damage."
