"""The processor time of `council resume` and `council status` after a long run.

    python benchmarks/resume.py [--quick]

Both commands run on a killed run of 10,000 tasks, compared with one of 1,000 tasks. The resume is killed as soon as its
first attempt is recorded, so that each one has to clean up the session of the one before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from signal import SIGKILL
from typing import Final

from benchmarks.measure import (
    INTERRUPTED,
    QUICK_ROUNDS,
    ROUNDS,
    BenchmarkRow,
    argument_parser,
    council_path,
    measure_command,
    measure_pairs,
    median,
    print_table,
    scratch_folder,
    user_environment,
)
from benchmarks.repositories import run_git

TASKS: Final = (10_000, 1_000)
QUICK_TASKS: Final = (100, 10)
LIMIT: Final = 2.0
_KILLED: Final = {"COUNCIL_FAILPOINTS": "attempt.recorded=kill"}


def measure(*, quick: bool, folder: Path | None = None, rounds: int | None = None) -> list[BenchmarkRow]:
    """Return the rows of this benchmark, from `rounds` pairs of measurements."""
    with scratch_folder(folder) as scratch:
        env = user_environment(
            None if quick else scratch / "bytecode", COUNCIL_HOME=str(scratch / "home"), COUNCIL_TRUST="1"
        )
        many, few = QUICK_TASKS if quick else TASKS
        tops = [_killed_run(scratch, tasks, env) for tasks in (many, few)]
        rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
        return [
            _row(what, {**env, **more}, tops, (many, few), rounds, code)
            for what, more, code in (("resume", _KILLED, -SIGKILL), ("status", {}, INTERRUPTED))
        ]


def _killed_run(scratch: Path, tasks: int, env: Mapping[str, str]) -> Path:
    top, file = scratch / f"repository{tasks}", scratch / f"{tasks}.yaml"
    run_git(None, "init", "--quiet", "-b", "main", str(top))
    run_git(top, "commit", "--quiet", "--allow-empty", "-m", "Begin")
    config = {
        "version": 1,
        "repo": str(top),
        "target": "main",
        "capacity": 1,
        "adapters": {"nothing": {"use": "command", "argv": ["true"]}},
        "tasks": [{"id": f"task-{number:05d}", "prompt": f"Do number {number}."} for number in range(tasks)],
    }
    file.write_text(json.dumps(config), encoding="utf-8")
    measure_command([council_path(), "run", str(file)], env={**env, **_KILLED}, cwd=top, code=-SIGKILL)
    return top


def _row(
    what: str, env: Mapping[str, str], tops: list[Path], tasks: tuple[int, int], rounds: int, code: int
) -> BenchmarkRow:
    many, few = (lambda top=top: measure_command([council_path(), what], env=env, cwd=top, code=code) for top in tops)
    pairs = measure_pairs(many, few, rounds)
    took, base = (1000 * median([pair[side].cpu for pair in pairs]) for side in (0, 1))
    ratio = median([ours.cpu / other.cpu for ours, other in pairs])
    name, than = f"council {what}, {tasks[0]:,} tasks, processor", f"{tasks[1]:,} tasks: {base:.3g} ms"
    return BenchmarkRow(name, took, "ms", than, ratio, LIMIT, is_ratio_limited=True)


if __name__ == "__main__":
    options = argument_parser(__doc__).parse_args()
    print_table(measure(quick=options.quick, folder=options.folder))
