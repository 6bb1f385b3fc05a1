"""List the newest run's unmerged work, retry its failed tasks, and resume it.

python examples/retry_failed_tasks.py       (in the repository that the run was in)
"""

from __future__ import annotations

import sys

import anyio

from orchestrator import Council, RunStatus, TaskStatus


async def main() -> int:
    """Retry tasks that failed or did not merge."""
    async with Council.open() as council:
        report = await council.runs.status()
        if report.status is RunStatus.RUNNING:
            print(f"{report.run} is running")
            return report.exit_code
        for work in await council.changes.preserved(report.run):
            print(f"preserved: {work.name}")
        failed = [task.id for task in report.tasks if task.status in {TaskStatus.FAILED, TaskStatus.CONFLICT}]
        for task in failed:
            async for part in council.logs.chunks(task, report.run):
                print(f"{task} {part.stream}: {part.text.strip()}")
        if failed:
            await council.tasks.retry(*failed)
        report = await council.runs.resume()
    print(report.status)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(anyio.run(main))
