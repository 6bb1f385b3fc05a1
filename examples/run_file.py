"""Run a YAML file from Python, and print the result of each task.

python examples/run_file.py council.yaml
"""

from __future__ import annotations

import sys

import anyio

from orchestrator import ConfigError, Council, RefusedError


async def main(file: str) -> int:
    """Run the file; return the exit code of `council run`."""
    try:
        async with Council.open(file) as council:
            report = await council.runs.run()
    except ConfigError as error:  # all errors in the file, as file:line:column: problem: fix
        print(error)
        return 2
    except RefusedError as error:  # nothing was started
        print(f"{error.message}: {error.remedy}")
        return 2
    for task in report.tasks:
        print(f"{task.id}: {task.status}", f"as {task.landed[:10]}" if task.landed else task.reason or "")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(anyio.run(main, sys.argv[1]))
