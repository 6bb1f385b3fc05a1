"""The command that shows an active run, from any terminal."""

from __future__ import annotations

import anyio
import click

from orchestrator.cli.core.command import CouncilContext, council_command, run_argument, verbose_option
from orchestrator.cli.live.display import show_progress
from orchestrator.cli.render.result import running_task_lines

#: Seconds between two checks whether a process is still active in the run: a killed one records no end.
_LIVENESS_INTERVAL = 0.5


@click.command()
@run_argument
@verbose_option
@council_command()
async def watch(context: CouncilContext, run: str | None) -> int:
    """Show an active run until it ends; Ctrl-C ends only the display.

    Without a terminal, prints the running tasks, then a line for each event. RUN defaults to the newest run.

    \b
    Examples:
      council watch
      council watch 20260102-030405-abcd
    """
    council, output = context.council, context.output
    name = await council.runs.find(run)
    after = await council.history.position()
    if await council.runs.is_live(name):
        context.interrupt.message = f"the display ended; run {name} continues"
        if not (output.as_json or output.can_draw_tables):  # the table shows them
            output.text("".join(f"{line}\n" for line in running_task_lines(await council.runs.status(name))))
        async with show_progress(council, name, output, after) as progress:
            while await council.runs.is_live(name):  # noqa: ASYNC110  another process, which may also be killed
                await anyio.sleep(_LIVENESS_INTERVAL)
            await progress.reach(await council.history.position())
    return await context.show_result(await council.runs.status(name))
