"""Claims of tasks by eight processes on PostgreSQL, compared with the fetches of procrastinate.

python -m benchmarks.postgres_claims [--quick], with COUNCIL_TEST_POSTGRES_URL or an installed server. Both use the same
server, durable transactions, and number of concurrent claims. As in a run, each process has a board of the tasks, which
follows the claims of the others, and claims a task by one guarded commit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import anyio
from procrastinate import App, PsycopgConnector

from benchmarks.measure import BenchmarkRow, median, percentile
from benchmarks.server_stores import PROCESSES, Outcome, main, run_processes, wait_for_begin
from benchmarks.state import make_document
from orchestrator.domain.runs.statuses import TaskStatus
from orchestrator.domain.scheduling.dispatch import DispatchBoard, DispatchEntry
from orchestrator.errors import VersionConflict
from orchestrator.protocols import Commit, Document, Event, Guard, Key, Store, Write
from orchestrator.state.stores.postgres.store import PostgresStore
from tests.postgres_server import empty_store_url

# It warns that its application is in the main module, which other programs cannot import.
logging.getLogger("procrastinate").setLevel(logging.ERROR)

RATE_LIMIT: Final = 0.5  # times the duration of procrastinate
CLAIM_LIMIT: Final = 50.0  # ms, of the slowest in a hundred
_FILLED_AT_ONCE: Final = 500

Claim = Callable[[], Awaitable[int | None]]
"""Returns a claimed task, or None if there is none left."""


def _measure(quick: bool) -> list[BenchmarkRow]:
    """Return the rates, with one and with several concurrent claims of each process.

    Raises RuntimeError if a task is not claimed once.
    """
    tasks, rounds = (100, 1) if quick else (2_000, 5)
    rows = []
    for slots in (1, 8):
        pairs = []
        for _ in range(rounds):
            urls = empty_store_url(), empty_store_url()
            anyio.run(_fill, urls[0], tasks)
            anyio.run(_fill_procrastinate, urls[1], tasks)
            jobs = f"store-{slots}", f"procrastinate-{slots}"
            pairs.append([_run(job, url, tasks) for job, url in zip(jobs, urls, strict=True)])
        ours, theirs = (tasks / median([pair[side].cost.wall for pair in pairs]) for side in (0, 1))
        ratio = median([one.cost.wall / other.cost.wall for one, other in pairs])
        slowest, slowest_theirs = (median([_slowest(pair[side]) for pair in pairs]) for side in (0, 1))
        what = f"claims on PostgreSQL, {PROCESSES} processes, {slots} at once in each"
        base = f"procrastinate: {theirs:.0f}/s"
        rows += [
            BenchmarkRow(what, ours, "/s", base, ratio, RATE_LIMIT, is_ratio_limited=True),
            BenchmarkRow(
                f"{what}: 99 of 100 within", slowest, "ms", f"procrastinate: {slowest_theirs:.3g} ms", limit=CLAIM_LIMIT
            ),
        ]
    return rows


def _run(job: str, url: str, tasks: int) -> Outcome:
    outcome = run_processes("postgres_claims", job, url, PROCESSES, tasks)
    claimed = [task for result in outcome.results for task in result["claimed"]]
    if sorted(claimed) != list(range(tasks)):
        raise RuntimeError(f"{job}: {len(claimed)} claims of {tasks} tasks, {len(set(claimed))} of them different")
    return outcome


def _slowest(outcome: Outcome) -> float:
    """Return the duration in ms that 99 of 100 claims do not exceed."""
    return percentile([seconds for result in outcome.results for seconds in result["took"]], 0.99) * 1e3


async def _claim_all(slots: int, claim: Claim) -> dict[str, Any]:
    """Claim concurrently until no task is left; return the claimed tasks and the duration of each claim."""
    claimed, took = list[int](), list[float]()

    async def claim_some() -> None:
        start = time.perf_counter()
        while (task := await claim()) is not None:
            claimed.append(task)
            took.append(time.perf_counter() - start)
            start = time.perf_counter()

    wait_for_begin()
    async with anyio.create_task_group() as group:
        for _ in range(slots):
            group.start_soon(claim_some)
    return {"claimed": claimed, "took": took}


class _Process:
    """A process that follows the claims of the others on its board."""

    def __init__(self, store: Store, me: int) -> None:
        self._store, self._me = store, me
        self._owner = Key("orchestrator", str(me))
        self._tasks: dict[str, Document] = {}
        self._board = DispatchBoard({})
        self._position, self._news = 0, anyio.Event()

    async def open(self) -> int:
        """Register the process and read all tasks; return the position up to which they are known."""
        await self._store.commit(Commit([Write(self._owner, 0, {"epoch": 1})]))
        position = await self._store.position()
        self._tasks = {task.key.id: task for task in await self._store.list("task")}
        self._board = DispatchBoard(dict.fromkeys(sorted(self._tasks, key=int), DispatchEntry()), worker=self._me)
        return position

    async def follow(self, position: int) -> None:
        """Show the claims of all processes on the board."""
        async with aclosing(self._store.watch(position)) as records:
            async for record in records:
                for key in record.documents:
                    if key.kind == "claim":
                        self._board.sync_task(key.id, TaskStatus.RUNNING, 0.0)
                self._position = record.position
                self._news.set()
                self._news = anyio.Event()

    async def claim(self) -> int | None:
        """Claim a free task, as the commit that starts an attempt does."""
        while chosen := self._board.choose_tasks(1, 0.0):
            task = self._tasks[chosen[0]]
            writes = [
                Write(task.key, task.version, {**task.value, "owner": self._me}),
                Write(Key("claim", task.key.id), 0, {"epoch": 1, "owner": self._me}),
            ]
            event, guard = Event("task.started", {"task": task.key.id}), Guard(self._owner, 1)
            with suppress(VersionConflict):
                await self._store.commit(Commit(writes, [event], [guard]))
                return int(task.key.id)
            await self._catch_up()  # in a run, the preparation of the next attempt takes longer
        return None

    async def _catch_up(self) -> None:
        position = await self._store.position()
        while self._position < position:
            await self._news.wait()


async def _by_store(slots: int, url: str, _tasks: int, me: int) -> dict[str, Any]:
    async with PostgresStore.open(url) as store, anyio.create_task_group() as group:
        process = _Process(store, me)
        group.start_soon(process.follow, await process.open())
        outcome = await _claim_all(slots, process.claim)
        group.cancel_scope.cancel()
    return outcome


async def _fill(url: str, tasks: int) -> None:
    async with PostgresStore.open(url) as store:
        for start in range(0, tasks, _FILLED_AT_ONCE):
            numbers = range(start, min(start + _FILLED_AT_ONCE, tasks))
            await store.commit(Commit([Write(Key("task", str(one)), 0, make_document(one)) for one in numbers]))


@asynccontextmanager
async def _open_app(url: str, connections: int = 1) -> AsyncIterator[App]:
    """Open procrastinate with its tables in the schema of a store's URL."""
    server, _, schema = url.partition("?schema=")
    connector = PsycopgConnector(
        conninfo=server, kwargs={"options": f"-c search_path={schema}"}, min_size=connections, max_size=connections
    )
    async with App(connector=connector).open_async() as app:
        yield app


async def _by_procrastinate(slots: int, url: str, _tasks: int, _me: int) -> dict[str, Any]:
    async with _open_app(url, slots) as app:
        worker = await app.job_manager.register_worker()

        async def claim() -> int | None:
            job = await app.job_manager.fetch_job(queues=None, worker_id=worker)
            return None if job is None else int(str(job.task_kwargs["number"]))

        return await _claim_all(slots, claim)


async def _fill_procrastinate(url: str, tasks: int) -> None:
    async with _open_app(url) as app:
        schema = url.partition("?schema=")[2]
        await app.connector.execute_query_async(f"CREATE SCHEMA {schema}")
        await app.schema_manager.apply_schema_async()
        task = app.configure_task("work", allow_unknown=True)
        await task.batch_defer_async(*({"number": number, **make_document(number)} for number in range(tasks)))


_JOBS: Final = {
    f"{name}-{slots}": partial(job, slots)
    for name, job in (("store", _by_store), ("procrastinate", _by_procrastinate))
    for slots in (1, 8)
}

if __name__ == "__main__":
    main("postgres_claims", _JOBS, _measure)
