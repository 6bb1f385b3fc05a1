"""Follow the events of a run, and cancel tasks that need too many attempts.

python examples/follow_events.py council.yaml
"""

from __future__ import annotations

import sys

import anyio

from orchestrator import Council


async def follow(council: Council, run: str) -> None:
    """Print each event until the run ends; this also works from another process."""
    async for recorded in council.runs.events(run):
        event = recorded.event
        print(recorded.position, event.type, event.data.get("task", ""))
        if event.type == "task.retrying" and event.data["attempt"] >= 2:
            await council.tasks.cancel(event.data["task"], run=run)


async def main(file: str) -> int:
    """Run the file and print its events."""
    async with Council.open(file) as council:
        run = await council.runs.create()
        async with anyio.create_task_group() as group:
            group.start_soon(follow, council, run)
            report = await council.runs.resume(run)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(anyio.run(main, sys.argv[1]))
