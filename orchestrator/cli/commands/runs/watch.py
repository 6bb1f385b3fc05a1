"""The command that shows an active run, from any terminal."""

from __future__ import annotations

import anyio
import click

from orchestrator.cli.core.command import (
    CommandContext,
    json_option,
    open_council,
    run_argument,
    run_command,
    show_result,
    store_option,
    verbose_option,
)
from orchestrator.cli.live.display import show_progress
from orchestrator.cli.render.result import running_task_lines

#: Seconds between two checks whether a process is still active in the run: a killed one records no end.
_LIVENESS_INTERVAL = 0.5


@click.command()
@run_argument
@verbose_option
@store_option
@json_option
def watch(run: str | None, as_json: bool) -> None:
    """Show an active run until it ends; Ctrl-C ends only the display.

    Without a terminal, prints the running tasks, then a line for each event. RUN defaults to the newest run.

    \b
    Examples:
      council watch
      council watch 20260102-030405-abcd
    """

    async def command(context: CommandContext) -> int:
        async with open_council(context.log) as council:
            name = await council.runs.find(run)
            after = await council.history.position()
            if await council.runs.is_live(name):
                if not (as_json or context.output.can_draw_tables):  # the table shows them
                    context.output.text(
                        "".join(f"{line}\n" for line in running_task_lines(await council.runs.status(name)))
                    )
                async with show_progress(council, name, context.output, after) as progress:
                    while await council.runs.is_live(name):  # noqa: ASYNC110  another process, which may also be killed
                        await anyio.sleep(_LIVENESS_INTERVAL)
                    await progress.reach(await council.history.position())
            report = await council.runs.status(name)
            await show_result(context, council, report)
            return report.exit_code

    run_command(command, as_json=as_json)
