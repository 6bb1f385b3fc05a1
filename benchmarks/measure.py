"""Measurements in pairs: subject and baseline alternate; the median ratio counts."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

#: Above this many runs the median of a baseline hardly improves.
ROUNDS: Final = 15
QUICK_ROUNDS: Final = 1
#: The exit code of `council status` for an interrupted run.
INTERRUPTED: Final = 130

_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  a folder is made in it, readable by its owner alone


class Cost(NamedTuple):
    """Seconds of wall time, and of processor time of all processes."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """A row of the table: a value, that of the baseline in the same run, and a limit."""

    what: str
    measured: float
    unit: str
    baseline: str = ""
    ratio: float | None = None
    limit: float | None = None
    is_ratio_limited: bool = False
    """Whether the limit applies to the ratio instead of the value."""

    @property
    def verdict(self) -> str:
        """Return whether the limit is met; empty without one."""
        if self.limit is None:
            return ""
        limited = self.ratio if self.is_ratio_limited else self.measured
        return "yes" if limited is not None and limited <= self.limit else "no"


def format_table(rows: Sequence[BenchmarkRow]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | measured | baseline | ratio | limit | kept |", "|---|---:|---|---:|---:|---|"]
    for row in rows:
        unit = "" if row.is_ratio_limited else f" {row.unit}"
        limit = "" if row.limit is None else f"{row.limit:g}{'x' if row.is_ratio_limited else unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        measured = f"{row.measured:.3g} {row.unit}"
        lines.append(f"| {row.what} | {measured} | {row.baseline} | {ratio} | {limit} | {row.verdict} |")
    return "\n".join(lines) + "\n"


def measure_pairs(measured: Callable[[], Cost], baseline: Callable[[], Cost], rounds: int) -> list[tuple[Cost, Cost]]:
    """Return the costs of both, alternating, after one run each to warm up."""
    measured(), baseline()
    return [(measured(), baseline()) for _ in range(rounds)]


def median(values: Iterator[float] | Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], part: float) -> float:
    """Return the lowest value that at least `part` of all values do not exceed."""
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]


def print_json(values: Mapping[str, Any]) -> None:
    """Print a line atomically: several processes share this output."""
    os.write(1, json.dumps(values).encode() + b"\n")


def measure_command(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, code: int = 0
) -> Cost:
    """Run a program without output; return its cost, with the children it awaited.

    Raises RuntimeError for another exit code, which would measure something else.
    """
    with measure_cost() as cost:
        ended = subprocess.run(argv, env=env, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if ended.returncode != code:
        raise RuntimeError(f"{argv} ended with {ended.returncode}: {ended.stderr.decode(errors='replace')[-2000:]}")
    return cost()


@contextmanager
def measure_cost() -> Iterator[Callable[[], Cost]]:
    """Measure the cost of the body; only awaited child processes count."""
    start, before = time.perf_counter(), _cpu()
    yield lambda: Cost(end - start, after - before)
    end, after = time.perf_counter(), _cpu()


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def user_environment(bytecode: Path | None = None, **changes: str) -> dict[str, str]:
    """Return a user's environment, with buffered output and cached byte code."""
    unwanted = {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    kept = {} if bytecode is None else {"PYTHONPYCACHEPREFIX": str(bytecode)}
    return {name: value for name, value in os.environ.items() if name not in unwanted} | kept | changes


@contextmanager
def scratch_folder(folder: Path | None) -> Iterator[Path]:
    """Create a working folder in `folder`, shared memory, or the default location."""
    parent = folder or (_SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None)
    with TemporaryDirectory(prefix="council-bench-", dir=parent) as made:
        yield Path(made)


def council_path() -> str:
    """Return the path of the `council` command of this Python."""
    return str(Path(sys.executable).with_name("council"))


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options of all benchmarks."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    made.add_argument("--quick", action="store_true", help="a short form that only shows that it works")
    made.add_argument("--folder", type=Path, help="where to work; default: shared memory, else the temporary folder")
    return made


def print_table(rows: Sequence[BenchmarkRow]) -> None:
    sys.stdout.write(format_table(rows))
