"""The whole cycle of many tasks, by `council run` and by plain git commands with as many at once.

    python benchmarks/cycle.py [--quick] [--repository PATH] [--folder PATH] [--sandbox KIND]

Each task has a worktree made, an agent run in it that writes one file, the file committed, the commit merged onto a
branch that no checkout of the user's has, and the worktree removed. By hand that is `git worktree add -b`, the agent,
`git add -A`, `git commit`, `git merge --no-ff` in a worktree kept for it, `git worktree remove --force` and
`git branch -D`. Both are done on clones of the same repository, which `benchmarks.code_base` makes; what counts is the
time of the processor of all processes, and that on the clock until nothing is left to delete.

Deleting and making files in turn is so slow on an ext4 without a journal that it drowns everything else: such a folder
is refused, and which file system it was is printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from benchmarks.measure import (
    BenchmarkRow,
    Cost,
    argument_parser,
    council_path,
    measure_cost,
    median,
    print_table,
    scratch_folder,
    user_environment,
)
from benchmarks.repositories import clone, file_system_kind, make_repository, run_git

TASKS: Final = 64
CAPACITY: Final = 8
FILES: Final = 5_000
ROUNDS: Final = 3
QUICK_TASKS: Final = 4
QUICK_FILES: Final = 50
CPU_LIMIT: Final = 0.35
WALL_LIMIT: Final = 0.35

#: Reads the name of a file from the prompt, and writes that file.
_AGENT: Final = ("sh", "-c", 'read -r name < "$0" && echo done > "$name"')


def measure(
    *, quick: bool, folder: Path | None = None, repository: Path | None = None, sandbox: str = "auto"
) -> list[BenchmarkRow]:
    """Return the rows of this benchmark. RuntimeError on a file system on which it would measure something else."""
    tasks, rounds = (QUICK_TASKS, 1) if quick else (TASKS, ROUNDS)
    with scratch_folder(folder) as place:
        kind = file_system_kind(place)
        origin = repository or make_repository(place / "origin", QUICK_FILES if quick else FILES)
        files = len(run_git(origin, "ls-files", "-z").split(b"\0")) - 1
        bytecode = None if quick else place / "bytecode"
        pairs = []
        for number in range(rounds):
            clones = [clone(origin, place / f"{way}{number}") for way in ("council", "git")]
            pairs.append((_by_council(clones[0], tasks, sandbox, bytecode), _by_git(clones[1], tasks)))
    what = f"cycle of {tasks} tasks, {files:,} files, on {kind}, sandbox {sandbox}"
    return [
        _row(f"{what}: processor", pairs, "cpu", tasks, CPU_LIMIT),
        _row(f"{what}: clock", pairs, "wall", tasks, WALL_LIMIT),
    ]


def _row(
    what: str, pairs: Sequence[tuple[Cost, Cost]], part: str, tasks: int, limit: float | None = None
) -> BenchmarkRow:
    took, base = (median([getattr(pair[side], part) for pair in pairs]) / tasks * 1e3 for side in (0, 1))
    ratio = median([getattr(one, part) / getattr(other, part) for one, other in pairs])
    return BenchmarkRow(what, took, "ms/task", f"plain git: {base:.3g} ms/task", ratio, limit, is_ratio_limited=True)


def _by_council(top: Path, tasks: int, sandbox: str, bytecode: Path | None) -> Cost:
    home = top.with_name(f"{top.name}-home")
    branch = run_git(top, "branch", "--show-current").decode().strip()
    config = {
        "version": 1,
        "repo": str(top),
        "base": branch,
        "target": "integration",
        "capacity": CAPACITY,
        "sandbox": sandbox,
        "adapters": {"agent": {"use": "command", "argv": [*_AGENT, "{prompt_file}"]}},
        "defaults": {"adapter": "agent"},
        "tasks": [{"id": f"task-{one}", "prompt": f"result-{one}.txt\n"} for one in range(tasks)],
    }
    file = top.with_name(f"{top.name}.yaml")
    file.write_text(json.dumps(config), encoding="utf-8")
    env = user_environment(bytecode, COUNCIL_HOME=str(home))
    with measure_cost() as cost:
        done = subprocess.run([council_path(), "run", str(file)], cwd=top, env=env, capture_output=True, check=False)
        _wait_until_gone(home)
    if done.returncode:
        raise RuntimeError(f"council ended with {done.returncode}: {done.stdout.decode()}{done.stderr.decode()}")
    _check(top, tasks)
    return cost()


def _wait_until_gone(home: Path) -> None:
    while any(home.glob("*/sessions/*")):
        threading.Event().wait(0.01)


def _by_git(top: Path, tasks: int) -> Cost:
    worktrees = top.with_name(f"{top.name}-worktrees")
    worktrees.mkdir()
    merging = threading.Lock()
    with measure_cost() as cost:
        run_git(top, "worktree", "add", "--quiet", "-b", "integration", str(worktrees / "integration"), "HEAD")
        with ThreadPoolExecutor(CAPACITY) as pool:
            list(pool.map(lambda task: _one_by_git(top, worktrees, task, merging), range(tasks)))
        run_git(top, "worktree", "remove", "--force", str(worktrees / "integration"))
    _check(top, tasks)
    return cost()


def _one_by_git(top: Path, worktrees: Path, task: int, merging: threading.Lock) -> None:
    branch, tree, prompt = f"task-{task}", worktrees / str(task), worktrees / f"{task}.md"
    run_git(top, "worktree", "add", "--quiet", "-b", branch, str(tree), "HEAD")
    prompt.write_text(f"result-{task}.txt\n", encoding="utf-8")
    subprocess.run([*_AGENT, str(prompt)], cwd=tree, check=True)
    run_git(tree, "add", "--all")
    run_git(tree, "commit", "--quiet", "-m", f"Task {task}")
    with merging:
        run_git(worktrees / "integration", "merge", "--quiet", "--no-ff", "-m", f"Land {task}", branch)
    run_git(top, "worktree", "remove", "--force", str(tree))
    run_git(top, "branch", "--quiet", "-D", branch)


def _check(top: Path, tasks: int) -> None:
    names = set(run_git(top, "ls-tree", "--name-only", "integration").decode().split())
    missing = [one for one in range(tasks) if f"result-{one}.txt" not in names]
    if missing:
        raise RuntimeError(f"the work of tasks {missing} is not on the branch")


if __name__ == "__main__":
    options = argument_parser(__doc__)
    options.add_argument("--repository", type=Path, help="work on clones of this one instead of a made one")
    options.add_argument("--sandbox", default="auto", help="as in a run's file: auto (the default), bubblewrap, off …")
    chosen = options.parse_args()
    try:
        rows = measure(quick=chosen.quick, folder=chosen.folder, repository=chosen.repository, sandbox=chosen.sandbox)
    except RuntimeError as error:
        sys.exit(str(error))
    print_table(rows)
