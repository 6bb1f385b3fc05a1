"""Look at the newest run, see what is left of it, have it tried again, and go on.

python examples/retry_failed_tasks.py       (in the repository that the run was in)
"""

from __future__ import annotations

import sys

import anyio

from orchestrator import Council, RunStatus, TaskStatus


async def main() -> int:
    """Try again whatever failed or did not merge."""
    async with Council.open() as council:
        report = await council.status()
        if report.status is RunStatus.RUNNING:
            print(f"{report.run} is at work")
            return report.exit_code
        for kept in await council.archive.kept(report.run):
            print(f"kept: {kept.name}")
        failed = [task.id for task in report.tasks if task.status in {TaskStatus.FAILED, TaskStatus.CONFLICT}]
        for task in failed:
            async for part in council.archive.log(report.run, task):
                print(f"{task} {part.stream}: {part.text.strip()}")
        if failed:
            await council.retry(*failed)
        report = await council.resume()
    print(report.status)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(anyio.run(main))
