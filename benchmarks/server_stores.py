"""Durations of concurrent commits: a store on a server, and a bare client of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import IO, Final

import anyio

from benchmarks.measure import BenchmarkRow, Cost, argument_parser, measure_cost, measure_pairs, median, print_table
from benchmarks.state import make_document
from orchestrator.protocols import Commit, Event, Key, Write

LIMIT: Final = 1 / 0.7
PROCESSES: Final = 8

Job = Callable[[str, int, int], Awaitable[None]]
"""Makes a number of commits to the store at a URL, for the process with a number, after `wait_for_begin`."""


def make_commit(me: int, number: int) -> Commit:
    """Return a numbered commit of a process: one document of a hundred, and an event."""
    key = Key("task", f"{me}/{number % 100}")
    return Commit([Write(key, number // 100, make_document(number))], [Event("e", {"n": number})])


def wait_for_begin() -> None:
    """Wait until all processes are ready."""
    os.write(1, b"ready\n")
    sys.stdin.readline()


def main(name: str, client: str, empty_store_url: Callable[[], str], by_store: Job, by_client: Job) -> None:
    """Run a benchmark, or one of its processes: `python -m benchmarks.NAME [--quick]`."""
    jobs = {"store": by_store, "bare": by_client}
    if sys.argv[1:2] and sys.argv[1] in jobs:
        job, address, times, me = sys.argv[1:]
        anyio.run(jobs[job], address, int(times), int(me))
        os.write(1, b"done\n")
    else:
        quick = argument_parser(f"python -m benchmarks.{name}").parse_args().quick
        print_table(_measure(name, client, empty_store_url, quick=quick))


def _measure(name: str, client: str, empty_store_url: Callable[[], str], *, quick: bool) -> list[BenchmarkRow]:
    """Return the durations of commits by one and by eight processes."""
    rows = []
    for processes, commits in ((1, 500), (PROCESSES, 100)):
        count = commits // 20 if quick else commits

        def run(job: str, processes: int = processes, count: int = count) -> Cost:
            return _run(name, job, empty_store_url(), processes, count)

        pairs = measure_pairs(lambda: run("store"), lambda: run("bare"), 1 if quick else 5)
        ours, bare = (processes * count / median([pair[side].wall for pair in pairs]) for side in (0, 1))
        ratio = median([one.wall / other.wall for one, other in pairs])
        what, base = f"{name}: durable commits, processes: {processes}", f"bare {client}: {bare:.0f}/s"
        rows.append(BenchmarkRow(what, ours, "/s", base, ratio, LIMIT, is_ratio_limited=True))
    return rows


def _run(name: str, job: str, url: str, processes: int, commits: int) -> Cost:
    """Run processes that each make so many commits; the cost excludes their start."""
    argv = [sys.executable, "-m", f"benchmarks.{name}", job, url, str(commits)]
    started = [
        subprocess.Popen([*argv, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(processes)
    ]
    pipes = [(process.stdin, process.stdout) for process in started]
    for _, output in pipes:
        _read_line(output)
    with measure_cost() as cost:
        for commands, _ in pipes:
            if commands:
                commands.write("\n")
                commands.flush()
        for _, output in pipes:
            _read_line(output)
    for process in started:
        process.communicate()
    return cost()


def _read_line(output: IO[str] | None) -> None:
    if output is not None:
        output.readline()
