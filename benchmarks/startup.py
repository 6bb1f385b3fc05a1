"""The duration of read-only commands.

    python benchmarks/startup.py [--quick]

`council --help` compared with a click program that prints a line, and `council status` of a run of 10,000 tasks
compared with `import click`; both with the same Python, in wall time, on an idle machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Final

from benchmarks import long_run
from benchmarks.measure import (
    INTERRUPTED,
    QUICK_ROUNDS,
    ROUNDS,
    BenchmarkRow,
    Cost,
    argument_parser,
    council_path,
    measure_command,
    measure_pairs,
    median,
    print_table,
    scratch_folder,
    user_environment,
)

TASKS: Final = 10_000
QUICK_TASKS: Final = 200  # with fewer no snapshot is written
STORE_LIMIT: Final = 1.5  # times the duration with the embedded store
_WALL, _CPU = attrgetter("wall"), attrgetter("cpu")

_HELLO: Final = """
import sys
import click

@click.command()
def main() -> None:
    click.echo("hello")

if __name__ == "__main__":
    sys.exit(main())
"""


def measure(*, quick: bool, folder: Path | None = None) -> list[BenchmarkRow]:
    """Return the rows of this benchmark."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with scratch_folder(folder) as scratch:
        env = user_environment(None if quick else scratch / "bytecode", COUNCIL_HOME=str(scratch / "home"))
        return [_help(scratch, env, rounds), *_status(scratch, env, rounds, QUICK_TASKS if quick else TASKS)]


def _help(scratch: Path, env: Mapping[str, str], rounds: int) -> BenchmarkRow:
    hello = scratch / "hello.py"
    hello.write_text(_HELLO, encoding="utf-8")
    pairs = measure_pairs(
        lambda: measure_command([council_path(), "--help"], env=env),
        lambda: measure_command([sys.executable, str(hello)], env=env),
        2 * rounds,
    )
    return _row("council --help", pairs, "click hello world", limit=1.2, is_ratio_limited=True)


def _status(scratch: Path, env: Mapping[str, str], rounds: int, tasks: int) -> list[BenchmarkRow]:
    top = scratch / "repository"
    log = long_run.make_project(top, tasks, scratch / "home")
    pairs = measure_pairs(
        lambda: measure_command([council_path(), "status"], env=env, cwd=top, code=INTERRUPTED),
        lambda: measure_command([sys.executable, "-c", "import click"], env=env),
        rounds,
    )
    (log / "snapshot").unlink()
    restarted = measure_command([council_path(), "status"], env=env, cwd=top, code=INTERRUPTED)
    what = f"council status, {tasks:,} tasks"
    return [
        _row(what, pairs, "import click", limit=0.5),
        BenchmarkRow(f"{what}, without a snapshot", restarted.wall, "s"),
    ]


def measure_status_on(url: str, name: str, *, quick: bool, folder: Path | None = None) -> list[BenchmarkRow]:
    """Return the duration of `council status` on an empty store of another kind, compared with the embedded one."""
    tasks, rounds = (QUICK_TASKS, QUICK_ROUNDS) if quick else (TASKS, ROUNDS)
    with scratch_folder(folder) as scratch:
        env = user_environment(None if quick else scratch / "bytecode", COUNCIL_HOME=str(scratch / "home"))
        top = scratch / "repository"
        log = long_run.make_project(top, tasks, scratch / "home")
        measure_command([council_path(), "state", "copy", str(log.parent), url], env=env, cwd=top)
        command, other = [council_path(), "status"], {**env, "COUNCIL_STATE": url}
        pairs = measure_pairs(
            lambda: measure_command(command, env=other, cwd=top, code=INTERRUPTED),
            lambda: measure_command(command, env=env, cwd=top, code=INTERRUPTED),
            rounds,
        )
    what, than = f"{name}: council status, {tasks:,} tasks", "embedded store"
    return [
        _row(what, pairs, than, limit=STORE_LIMIT, is_ratio_limited=True),
        _row(f"{what}: processor", pairs, than, limit=STORE_LIMIT, is_ratio_limited=True, of=_CPU),
    ]


def _row(
    what: str,
    pairs: list[tuple[Cost, Cost]],
    than: str,
    *,
    limit: float,
    is_ratio_limited: bool = False,
    of: Callable[[Cost], float] = _WALL,
) -> BenchmarkRow:
    took, base = (median([of(pair[side]) for pair in pairs]) for side in (0, 1))
    ratio = median([of(ours) / of(other) for ours, other in pairs])
    return BenchmarkRow(what, took, "s", f"{than}: {base:.3g} s", ratio, limit, is_ratio_limited)


if __name__ == "__main__":
    options = argument_parser(__doc__).parse_args()
    print_table(measure(quick=options.quick, folder=options.folder))
