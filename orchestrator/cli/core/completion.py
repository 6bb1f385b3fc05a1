"""Shell completion of runs, tasks and unmerged work. Never fails or prints."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable

import anyio
import click

from orchestrator.api.council import Council
from orchestrator.domain.runs.statuses import FINAL_STATUSES, RETRYABLE_STATUSES, TaskStatus

Completer = Callable[[click.Context, click.Parameter, str], list[str]]

#: Seconds after which completion gives up.
_TIMEOUT = 3.0


def _completer(names: Callable[[Council, str | None], Awaitable[Iterable[str]]]) -> Completer:
    """Return a click callback that completes a word; `names` gets the `--run` value."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        async def ask() -> list[str]:
            with anyio.fail_after(_TIMEOUT):
                async with Council.open() as council:
                    return list(await names(council, ctx.params.get("run")))

        try:
            found = anyio.run(ask)
        except Exception:  # noqa: BLE001  a shell that completes can't show a message
            return []
        given = ctx.params.get(param.name or "")
        present = given if isinstance(given, tuple) else ()
        return [name for name in found if name.startswith(incomplete) and name not in present]

    return complete


async def _runs(council: Council, _: str | None) -> Iterable[str]:
    return (await council.runs.ids())[::-1]


def _tasks(states: Collection[str]) -> Completer:
    async def names(council: Council, run: str | None) -> Iterable[str]:
        report = await council.runs.status(await council.runs.find(run))
        return [task.id for task in report.tasks if task.status in states]

    return _completer(names)


async def _preserved_work(council: Council, run: str | None) -> Iterable[str]:
    return [one.name for one in await council.changes.preserved(await council.runs.find(run))]


async def _checkpoints(council: Council, run: str | None) -> Iterable[str]:
    return [one.id for one in await council.checkpoints.list(run)][::-1]


_ALL = {*TaskStatus, "blocked"}
complete_runs = _completer(_runs)
complete_tasks = _tasks(_ALL)
complete_unfinished_tasks = _tasks(_ALL - FINAL_STATUSES)
complete_retryable_tasks = _tasks(RETRYABLE_STATUSES)
complete_approvable_tasks = _tasks({TaskStatus.AWAITING_APPROVAL})
complete_preserved_work = _completer(_preserved_work)
complete_checkpoints = _completer(_checkpoints)
