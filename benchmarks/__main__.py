"""Run all benchmarks; print one table, and write it to `build/bench.md`.

python -m benchmarks [--quick] [--folder PATH]
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks import (
    conflict_prediction,
    contexts,
    cycle,
    locks,
    merge_queue,
    resume,
    scheduler,
    session_commands,
    startup,
    state,
    worktrees,
)
from benchmarks.measure import argument_parser, format_table

RESULTS: Final = Path("build", "bench.md")


def main() -> None:
    """Run all benchmarks."""
    options = argument_parser(__doc__).parse_args()
    rows = [
        *startup.measure(quick=options.quick, folder=options.folder),
        *resume.measure(quick=options.quick, folder=options.folder),
        *session_commands.measure(quick=options.quick, folder=options.folder),
        *scheduler.measure(quick=options.quick),
        *state.measure(quick=options.quick, folder=options.folder),
        *contexts.measure(quick=options.quick, folder=options.folder),
        *locks.measure(quick=options.quick, folder=options.folder),
        *worktrees.measure(quick=options.quick, folder=options.folder),
        *cycle.measure(quick=options.quick, folder=options.folder),
        *merge_queue.measure(quick=options.quick, folder=options.folder),
        *conflict_prediction.measure(quick=options.quick, folder=options.folder),
    ]
    git = subprocess.run(["git", "--version"], check=True, capture_output=True, text=True).stdout.strip()  # noqa: S607
    where = f"Python {platform.python_version()}, {git}, {platform.system()} {platform.machine()}"
    text = f"{format_table(rows)}\n{where}; medians of paired runs.\n"
    sys.stdout.write(text)
    if not options.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
