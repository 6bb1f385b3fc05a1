"""Call a council from code that is not asynchronous: `asyncio.run` makes an event loop for the time of a run.

    python examples/from_sync_code.py council.yaml

In a notebook, which has a loop already, write `await run(file)` instead; in a thread beside a loop of yours,
`anyio.from_thread.run(run, file)`.
"""

from __future__ import annotations

import asyncio
import sys

from orchestrator import Council, RunReport


async def run(file: str) -> RunReport:
    """Run the file."""
    async with Council.open(file) as council:
        return await council.run()


def main(file: str) -> int:
    """Run the file from here, where nothing can be awaited."""
    report = asyncio.run(run(file))
    print(report.status)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
