"""Check runs, time and processor time of a merge queue with slow checks, compared with one check at a time.

    python benchmarks/merge_queue.py [--quick]

All tasks are built and queued, the check takes seconds, two tasks make it fail, and one task has a second check, which
fails once by chance. The first queue checks batches, the second one looks ahead, the baseline does neither.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.measure import (
    BenchmarkRow,
    Cost,
    argument_parser,
    council_path,
    measure_command,
    print_table,
    scratch_folder,
    user_environment,
)
from benchmarks.repositories import run_git

TASKS: Final = 40
SECONDS: Final = 10.0
QUICK_TASKS: Final = 6
QUICK_SECONDS: Final = 0.2
CAPACITY: Final = 8
RUNS_LIMIT: Final = 14
WALL_LIMIT: Final = 0.35
CPU_LIMIT: Final = 2.0
BATCHES: Final = {"batch": 16, "window": 1}
AHEAD: Final = {"batch": 1, "window": 4}
SERIAL: Final = {"batch": 1, "window": 1}


class _Landed(NamedTuple):
    cost: Cost
    runs: int


def measure(*, quick: bool, folder: Path | None = None) -> list[BenchmarkRow]:
    """Return the rows of this benchmark."""
    tasks, seconds = (QUICK_TASKS, QUICK_SECONDS) if quick else (TASKS, SECONDS)
    with scratch_folder(folder) as scratch:
        batches, ahead, serial = (
            _land(scratch / name, merge, tasks, seconds)
            for name, merge in (("batches", BATCHES), ("ahead", AHEAD), ("serial", SERIAL))
        )
    what = f"{tasks} tasks, checks of {seconds:g} s"
    base = f"one at a time: {serial.cost.wall:.3g} s, {serial.runs} runs"
    rows = [BenchmarkRow(f"{what}: runs with batches", batches.runs, "runs", base, None, RUNS_LIMIT)]
    for name, way in (("batches", batches), ("looking ahead", ahead)):
        wall, cpu = way.cost.wall / serial.cost.wall, way.cost.cpu / serial.cost.cpu
        rows.append(_row(f"{what}, {name}: clock", way.cost.wall, base, wall, WALL_LIMIT))
        rows.append(_row(f"{what}, {name}: processor", way.cost.cpu, base, cpu, CPU_LIMIT))
    return rows


def _row(what: str, seconds: float, base: str, ratio: float, limit: float) -> BenchmarkRow:
    return BenchmarkRow(what, seconds, "s", base, ratio, limit, is_ratio_limited=True)


def _land(folder: Path, merge: dict[str, Any], tasks: int, seconds: float) -> _Landed:
    """Queue the tasks, then land them."""
    folder.mkdir()
    top, log, file = folder / "repository", folder / "log", folder / "council.yaml"
    log.mkdir()
    run_git(None, "init", "--quiet", "-b", "main", str(top))
    (top / "README.md").write_text("A project\n", encoding="utf-8")
    run_git(top, "add", "README.md")
    run_git(top, "commit", "--quiet", "-m", "Begin")
    bad = {tasks // 3, 2 * tasks // 3}
    flaky = f"test -e {log}/failed || {{ touch {log}/failed; exit 1; }}"
    check = f"echo x >> {log}/runs; sleep {seconds}; ! ls bad* 2> {log}/error"
    names = [f"{'bad' if number in bad else 'done'}{number}" for number in range(tasks)]
    config = {
        "version": 1,
        "repo": str(top),
        "target": "main",
        "capacity": tasks,
        "session_memory": "1MiB",
        "writable": [str(log)],
        "merge": merge,
        "adapters": {"agent": {"use": "command", "argv": ["sh", "-c", 'touch "$(cat "$0")"', "{prompt_file}"]}},
        "defaults": {"checks": [check], "allow_failing_base": True, "on_checks_failed": "fail"},
        "tasks": [
            {"id": name, "prompt": name, **({} if name != names[-1] else {"checks": [check, flaky]})} for name in names
        ],
    }
    file.write_text(json.dumps(config), encoding="utf-8")
    env = user_environment(COUNCIL_HOME=str(folder / "home"), COUNCIL_TRUST="1")
    (top / "README.md").write_text("Not committed\n", encoding="utf-8")
    killed = {"COUNCIL_FAILPOINTS": f"work.recorded=kill@{tasks}"}
    measure_command(
        [council_path(), "run", str(file), "--allow-deferred"], env={**env, **killed}, cwd=top, code=-signal.SIGKILL
    )
    run_git(top, "checkout", "--", "README.md")
    (log / "runs").unlink(missing_ok=True)
    cost = measure_command([council_path(), "resume", "-j", str(CAPACITY)], env=env, cwd=top, code=1)
    landed = set(run_git(top, "ls-tree", "--name-only", "main").decode().split())
    if landed != {"README.md", *(name for name in names if name.startswith("done"))}:
        raise RuntimeError(f"landed: {sorted(landed)}")
    return _Landed(cost, len((log / "runs").read_text(encoding="utf-8").splitlines()))


if __name__ == "__main__":
    options = argument_parser(__doc__).parse_args()
    print_table(measure(quick=options.quick, folder=options.folder))
