"""The cost of picking the next task out of 100,000 pending ones, and their memory.

    python benchmarks/scheduler.py [--quick]

A pick is the time of `decide` per started task, eight at a time; this includes making tasks ready. The whole cycle
adds the reports that a task is built and has landed. The baseline pushes each task onto a plain heap and pops it.
Owners of paths have no limit: each of their picks also checks the live owners.
"""

from __future__ import annotations

import gc
import heapq
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Final

from benchmarks.measure import BenchmarkRow, argument_parser, median, print_table
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry

TASKS: Final = 100_000
QUICK_TASKS: Final = 2_000
CAPACITY: Final = 8
MEMORY_LIMIT: Final = 250.0  # MB
PICK_LIMIT: Final = 3.0  # microseconds
_ROUNDS: Final = 5
_CHAIN: Final = 10
_SHARED: Final = 50

Shape = Callable[[int], Mapping[str, DispatchEntry]]


def priorities(tasks: int) -> Mapping[str, DispatchEntry]:
    """Return tasks of five priorities and three adapters, all ready at once."""
    return {f"task-{number}": DispatchEntry((), f"adapter-{number % 3}", number % 5) for number in range(tasks)}


def chains(tasks: int) -> Mapping[str, DispatchEntry]:
    """Return chains of ten tasks, each of which needs the one before."""
    return {
        f"task-{number}": DispatchEntry((f"task-{number - 1}",) if number % _CHAIN else (), "adapter", number % 5)
        for number in range(tasks)
    }


def owners(tasks: int) -> Mapping[str, DispatchEntry]:
    """Return tasks that own paths, with fifty of them per path."""
    return {
        f"task-{number}": DispatchEntry((), "adapter", number % 5, (f"src/{number // _SHARED}/**",))
        for number in range(tasks)
    }


SHAPES: Final[Mapping[str, Shape]] = {"priorities": priorities, "chains of needs": chains, "owned paths": owners}


def measure(*, quick: bool) -> list[BenchmarkRow]:
    """Return the rows of this benchmark."""
    tasks = QUICK_TASKS if quick else TASKS
    return [*(row for name in SHAPES for row in _picks(name, tasks)), *(_memory(name, tasks) for name in SHAPES)]


def _picks(name: str, tasks: int) -> list[BenchmarkRow]:
    entries = SHAPES[name](tasks)
    rounds = [(_through_board(entries), _through_heap(tasks)) for _ in range(_ROUNDS)]
    pick, way, base = (median([cost[part] / tasks * 1e6 for cost in map(_flat, rounds)]) for part in range(3))
    limit = None if name == "owned paths" else PICK_LIMIT
    than = f"plain heap: {base:.3g} µs"
    return [
        BenchmarkRow(
            f"a pick of {tasks:,}, {name}", pick, "µs", than, median([times[0] / two for times, two in rounds]), limit
        ),
        BenchmarkRow(
            f"whole way, {tasks:,}, {name}", way, "µs", than, median([times[1] / two for times, two in rounds])
        ),
    ]


def _flat(costs: tuple[tuple[float, float], float]) -> tuple[float, float, float]:
    return *costs[0], costs[1]


def _through_board(entries: Mapping[str, DispatchEntry]) -> tuple[float, float]:
    """Return the processor seconds of all decisions, and of the whole cycle."""
    board = DispatchBoard(entries)
    _forget_cycles()
    begin = time.thread_time()
    deciding = run_all_tasks(board, len(entries))
    return deciding, time.thread_time() - begin


def run_all_tasks(board: DispatchBoard, tasks: int) -> float:
    """Pick and land all tasks; return the processor seconds of the decisions."""
    now, deciding = 0.0, 0.0
    while tasks:
        begin = time.thread_time()
        starts = board.choose_tasks(CAPACITY, now)
        deciding += time.thread_time() - begin
        for task in starts:
            board.built(task)
            board.landed(task)
        if not starts:
            raise RuntimeError(f"{tasks} tasks were never picked")
        tasks, now = tasks - len(starts), now + 1.0
    return deciding


def _through_heap(tasks: int) -> float:
    places = [(-float(number % 5), number, f"task-{number}") for number in range(tasks)]
    _forget_cycles()
    begin = time.thread_time()
    heap: list[tuple[float, int, str]] = []
    for scratch in places:
        heapq.heappush(heap, scratch)
    while heap:
        heapq.heappop(heap)
    return time.thread_time() - begin


def _forget_cycles() -> None:
    """Exclude existing objects from garbage collection, like `council` itself."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


def _memory(name: str, tasks: int) -> BenchmarkRow:
    """Return the peak memory that the board of all tasks adds to a process."""
    argv = [sys.executable, __file__, "--memory", name, str(tasks)]
    grown = int(subprocess.run(argv, check=True, capture_output=True).stdout)
    return BenchmarkRow(f"memory, {tasks:,} tasks, {name}", grown / 1e6, "MB", limit=MEMORY_LIMIT)


def _grow(name: str, tasks: int) -> int:
    entries = SHAPES[name](tasks)
    tracemalloc.start()
    run_all_tasks(DispatchBoard(entries), tasks)
    return tracemalloc.get_traced_memory()[1]


if __name__ == "__main__":
    options = argument_parser(__doc__)
    options.add_argument("--memory", nargs=2, metavar=("SHAPE", "TASKS"), help="print the bytes of one board")
    chosen = options.parse_args()
    if chosen.memory:
        sys.stdout.write(f"{_grow(chosen.memory[0], int(chosen.memory[1]))}\n")
    else:
        print_table(measure(quick=chosen.quick))
