"""Measurements of a store on a server: commits, the delay to other processes, and `council status`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import IO, Any, Final, NamedTuple

import anyio

from benchmarks import startup
from benchmarks.measure import (
    BenchmarkRow,
    Cost,
    argument_parser,
    measure_cost,
    measure_pairs,
    median,
    print_json,
    print_table,
)
from benchmarks.state import make_document
from benchmarks.watching import measure_watching
from orchestrator.protocols import Commit, Event, Key, Write

LIMIT: Final = 1 / 0.7
PROCESSES: Final = 8

Job = Callable[[str, int, int], Awaitable[Mapping[str, Any] | None]]
"""Works on the store at a URL with a number, for the process with a number, after `wait_for_begin`."""


def make_commit(me: int, number: int) -> Commit:
    """Return a numbered commit of a process: one document of a hundred, and an event."""
    key = Key("task", f"{me}/{number % 100}")
    return Commit([Write(key, number // 100, make_document(number))], [Event("e", {"n": number})])


def wait_for_begin() -> None:
    """Wait until all processes are ready."""
    print_json({})
    sys.stdin.readline()


def main(name: str, jobs: Mapping[str, Job], measure: Callable[[bool], list[BenchmarkRow]]) -> None:
    """Run a benchmark, or one of its processes: `python -m benchmarks.NAME [--quick]`."""
    if sys.argv[1:2] and sys.argv[1] in jobs:
        job, address, number, me = sys.argv[1:]
        print_json(anyio.run(_run_job, jobs[job], address, int(number), int(me)))
    else:
        print_table(measure(argument_parser(f"python -m benchmarks.{name}").parse_args().quick))


async def _run_job(job: Job, url: str, number: int, me: int) -> Mapping[str, Any]:
    return await job(url, number, me) or {}


def measure_store(name: str, client: str, empty_store_url: Callable[[], str], *, quick: bool) -> list[BenchmarkRow]:
    """Return the measurements of a store, compared with the jobs of a bare client of its server."""
    rows = []
    for processes, commits in ((1, 500), (PROCESSES, 100)):
        count = commits // 20 if quick else commits

        def run(job: str, processes: int = processes, count: int = count) -> Cost:
            return run_processes(name, job, empty_store_url(), processes, count).cost

        pairs = measure_pairs(lambda: run("store"), lambda: run("bare"), 1 if quick else 5)
        ours, bare = (processes * count / median([pair[side].wall for pair in pairs]) for side in (0, 1))
        ratio = median([one.wall / other.wall for one, other in pairs])
        what, base = f"{name}: durable commits, processes: {processes}", f"bare {client}: {bare:.0f}/s"
        rows.append(BenchmarkRow(what, ours, "/s", base, ratio, LIMIT, is_ratio_limited=True))
    return [
        *rows,
        *measure_watching(empty_store_url(), name, quick=quick),
        *startup.measure_status_on(empty_store_url(), name, quick=quick),
    ]


class Outcome(NamedTuple):
    """The cost of several processes, excluding their start, and their results."""

    cost: Cost
    results: list[dict[str, Any]]


def run_processes(name: str, job: str, url: str, processes: int, number: int) -> Outcome:
    """Run a job of a benchmark in several processes, which begin together."""
    argv = [sys.executable, "-m", f"benchmarks.{name}", job, url, str(number)]
    started = [
        subprocess.Popen([*argv, str(me)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for me in range(processes)
    ]
    pipes = [(process.stdin, process.stdout) for process in started]
    for _, output in pipes:
        _read_line(output)
    with measure_cost() as cost:
        for commands, _ in pipes:
            if commands:
                commands.write("\n")
                commands.flush()
        results = [_read_line(output) for _, output in pipes]
    for process in started:
        process.communicate()
    return Outcome(cost(), results)


def _read_line(output: IO[str] | None) -> dict[str, Any]:
    assert output  # noqa: S101  as asked for
    found: dict[str, Any] = json.loads(output.readline())
    return found
