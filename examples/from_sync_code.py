"""Use a council from synchronous code.

    python examples/from_sync_code.py council.yaml

`asyncio.run` creates an event loop for the duration of a run. In a notebook, which already has a loop, write
`await run(file)` instead; in a thread next to your own loop, `anyio.from_thread.run(run, file)`.
"""

from __future__ import annotations

import asyncio
import sys

from orchestrator import Council, RunReport


async def run(file: str) -> RunReport:
    """Run the file."""
    async with Council.open(file) as council:
        return await council.runs.run()


def main(file: str) -> int:
    """Run the file from synchronous code."""
    report = asyncio.run(run(file))
    print(report.status)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
