"""The composition root: opens the store, finds the repository, and puts a run's parts together."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import anyio
import anyio.to_thread

from orchestrator.archive import Archive
from orchestrator.clock import Clock, SystemClock
from orchestrator.config.model import AdapterConfig, RunConfig, restore_adapter
from orchestrator.domain.dispatch import Board
from orchestrator.domain.model import FINAL, Action, RunDocument, TaskDocument
from orchestrator.engine.capacity import Capacity
from orchestrator.engine.ledger import (
    Ledger,
    read_adapters,
    read_entries,
    read_requests,
    read_run,
    read_task,
    read_tasks,
    seed,
)
from orchestrator.engine.preflight import Site, check_branches, check_checkout, check_own, check_programs, find_site
from orchestrator.engine.recovery import recover
from orchestrator.engine.report import ReportPlaces, RunRecord, RunReport, RunStatus, report
from orchestrator.engine.requests import check_request, is_answered, obey, submit
from orchestrator.engine.scheduler import Scheduler
from orchestrator.engine.workshop import Workshop, open_workshop
from orchestrator.errors import LockHeld, RefusedError
from orchestrator.filelock import HeldLock
from orchestrator.plugins import load_adapter_types
from orchestrator.project import Project, council_home, exclude_from_git
from orchestrator.protocols import Adapter, JsonObject, Record
from orchestrator.repo.git import Git
from orchestrator.repo.hub import Hub, create_hub, hub_of, internal_ref
from orchestrator.repo.supported import check_complete, check_supported
from orchestrator.sessions.sandbox import choose_sandbox
from orchestrator.state.file import FileStore

#: Seconds that a killed owner's last git commands get to end before a resume gives up waiting for them.
HANDOVER_LIMIT = 60.0

#: Seconds between two looks whether a run's owner has done what was asked.
_ANSWER_PAUSE = 0.1
#: Seconds that a cancelled session gets to be over before whoever asked is told how it stands.
_STOP_PATIENCE = 15.0

#: Characters of all prompts of a run together: they are recorded at once.
LARGEST_PROMPTS = 12 << 20


@dataclass(frozen=True, slots=True)
class Places:
    """Where a project keeps things; the repositories are None before its first run."""

    repository: str | None
    state: Path
    log: Path
    logs: Path
    """The output of sessions: a folder for each run."""
    hub: Path | None
    trusted: Path | None


class Council:
    """One project's runs: start, resume, look at them. Made by `open_council`."""

    def __init__(self, project: Project, store: FileStore, clock: Clock, environ: Mapping[str, str]) -> None:
        self.project = project
        self._store, self._clock, self._environ = store, clock, environ
        self._scheduler: Scheduler | None = None
        self._stopping = False

    async def create_run(self, config: RunConfig, *, allow_deferred: bool = False) -> str:
        """Check that a config can run, record it, and return the run's id; nothing is started yet.

        RefusedError says what stands in the way: no such base, a target with changes of the user's own, a
        program that is missing.
        """
        if sum(len(task.prompt) for task in config.tasks) > LARGEST_PROMPTS:
            what = f"the prompts are larger than {LARGEST_PROMPTS >> 20} MiB together"
            raise RefusedError(what, "split the tasks into several runs")
        site = await find_site(config.repo, is_url=config.is_url, environ=self._environ)
        used = {task.adapter for task in config.tasks}
        stored = {name: entry.stored() for name, entry in config.adapters.items()}
        made = make_adapters(make_configs({name: entry for name, entry in stored.items() if name in used}))
        check_programs(made, self._environ)
        await choose_sandbox(config.fence.sandbox, network=config.fence.network, environ=self._environ)
        run = new_run_id(self._clock.now())
        target = config.target or f"council/{run}"
        hub, start = await self._prepare(site, config.base, target, run, allow_deferred=allow_deferred)
        document = RunDocument(
            id=run,
            config=str(config.path),
            repo=config.repo,
            is_url=config.is_url,
            base=config.base,
            target=target,
            capacity=config.capacity,
            session_memory=config.session_memory,
            adapters=stored,
            fence=config.fence.model_dump(mode="json"),
            tasks=tuple(task.id for task in config.tasks),
            start=start,
            hub=str(hub.root),
            started=self._clock.now(),
        )
        await seed(self._store, document, {task.id: task for task in config.tasks})
        return run

    async def _prepare(self, site: Site, base: str, target: str, run: str, *, allow_deferred: bool) -> tuple[Hub, str]:
        """Check the repository and bring its commits into our own; return that and the commit to start from."""
        users = Git(None, users=True, environ=self._environ)
        home = council_home(self._environ)
        if site.repository is not None:
            if site.repository.top is not None:
                await anyio.to_thread.run_sync(exclude_from_git, site.repository.git_dir)
                if home.is_relative_to(site.repository.top):
                    remedy = "set COUNCIL_HOME to a folder outside of it"
                    raise RefusedError(f"{home} is inside the repository", remedy)
            await check_complete(site.repository, users)
        heads = await check_branches(site.source(Git(None, environ=self._environ)), base, target)
        await check_checkout(site.repository, target, self._environ, allow_deferred=allow_deferred)
        hub = hub_of(site.identity, home)
        await create_hub(hub, site.object_format, self._environ)
        git = Git(hub.trusted, environ=self._environ)
        source = site.source(git)
        tip = await source.fetch(base, internal_ref(run, "base"))
        start = await source.fetch(target if target in heads else base, internal_ref(run, "start"))
        for commit in {tip, start}:
            await check_supported(git, commit)
        if (await git("merge-base", tip, start, ok=(0, 1))).returncode:
            raise RefusedError(f"{base!r} and {target!r} have no history in common", "set `base` or `target` anew")
        return hub, start

    async def execute(self, run: str) -> RunReport:
        """Take a run to its end, from wherever it stands, and report. Only one process can do that at a time."""
        hub = await self._hub(await read_run(self._store, run))
        try:
            async with self._ownership(hub, run) as lock:
                return await self._work(run, hub, lock.fd)
        except LockHeld as held:
            raise _is_at_work(run, held) from None

    @asynccontextmanager
    async def _ownership(self, hub: Hub, run: str) -> AsyncIterator[HeldLock]:
        """Hold the run's lock; wait for it only where its owner is dead and its last git commands end."""
        lock = hub.lock(f"run-{run}")
        async with AsyncExitStack() as stack:
            try:
                held = await stack.enter_async_context(lock.hold(0))
            except LockHeld as taken:
                if taken.owner_lives:
                    raise
                held = await stack.enter_async_context(lock.hold(HANDOVER_LIMIT))
            yield held

    async def _work(self, run: str, hub: Hub, lock_fd: int) -> RunReport:
        before = await self._record(run)
        statuses = {task: one.status for task, one in before.tasks.items()}
        is_over = before.run.ended is not None and Board.of(before.entries, statuses).is_over(statuses)
        if is_over and not await read_requests(self._store, run):
            return self._report(before, None)
        ledger, shop = await self._take(before.run, hub, lock_fd)
        capacities = {name: one.capacity for name, one in shop.configs.items() if one.capacity is not None}
        board = Board.of(before.entries, ledger.statuses(), capacities)
        capacity = await Capacity.measure(ledger, self._clock)
        self._scheduler = Scheduler(ledger, shop, board, capacity, self._clock)
        await self._scheduler.remember(before.adapters)
        if self._stopping:
            self._scheduler.stop()
        finished = await self._scheduler.run()
        status = None if finished else RunStatus.INTERRUPTED
        result = self._report(await self._record(run), status)
        await (ledger.finish(result.status) if finished else ledger.note("run.interrupted", {}))
        return result

    async def _take(self, run: RunDocument, hub: Hub, lock_fd: int) -> tuple[Ledger, Workshop]:
        """Become the run's owner, bring back what an earlier one left, and do what was asked of it."""
        configs = make_configs(run.adapters)
        shop = await open_workshop(
            run,
            hub,
            self.project,
            configs,
            make_adapters(configs),
            lock_fd=lock_fd,
            environ=self._environ,
            clock=self._clock,
        )
        facts = {"sandbox": str(shop.tools.fencing.kind)}
        ledger = await Ledger.take(self._store, self._clock, run.id, shop.tools.redactor, facts)
        await recover(ledger, shop, self._clock)
        for request in await ledger.requests():
            await obey(ledger, request)
        return ledger, shop

    async def ask(self, run: str, action: Action, tasks: Sequence[str]) -> RunReport:
        """Cancel tasks of a run or have them tried again (all that are not over, if none is named); report.

        A live owner does it; where there is none, it is done here, and `execute` goes on from there.
        """
        record = await self._record(run)
        for task in tasks:
            record.run.check_task(task)
        board = Board.of(record.entries, {task: one.status for task, one in record.tasks.items()})
        check_request(action, tasks, record.tasks, board.blocked)
        named = tasks or [task for task, one in record.tasks.items() if one.status not in FINAL]
        asked = await submit(self._store, self._clock, run, action, named)
        hub = await self._hub(record.run)
        while not await is_answered(self._store, run, asked):
            try:
                async with self._ownership(hub, run) as lock:
                    ledger, _ = await self._take(record.run, hub, lock.fd)
                    statuses = ledger.statuses()
                    if record.run.ended is not None or Board.of(record.entries, statuses).is_over(statuses):
                        await ledger.finish(self._report(await self._record(run), None).status)
            except LockHeld as held:
                if not held.owner_lives:
                    raise _is_at_work(run, held) from None
                await anyio.sleep(_ANSWER_PAUSE)
        if action is Action.CANCEL:
            await self._until_over(run, named)
        return await self.status(run)

    async def _until_over(self, run: str, tasks: Sequence[str]) -> None:
        """Wait, for as long as a session may take to stop, until tasks that were cancelled are over."""
        with anyio.move_on_after(_STOP_PATIENCE):
            for task in tasks:
                while (await read_task(self._store, run, task)).status not in FINAL:  # noqa: ASYNC110  another process
                    await anyio.sleep(_ANSWER_PAUSE)

    def stop(self) -> None:
        """End the run under way cleanly: sessions are stopped, what they did is kept, `resume` goes on from there."""
        self._stopping = True
        if self._scheduler is not None:
            self._scheduler.stop()

    async def status(self, run: str) -> RunReport:
        """Describe a run as it stands now."""
        record = await self._record(run)
        status = None
        if record.run.ended is None:
            status = RunStatus.RUNNING if await self.is_live(run) else RunStatus.INTERRUPTED
        return self._report(record, status)

    async def _record(self, run: str) -> RunRecord:
        document = await read_run(self._store, run)
        found = await read_tasks(self._store, run)
        tasks = {task: TaskDocument.model_validate(found[task].value) for task in document.tasks}
        entries = await read_entries(self._store, document)
        return RunRecord(document, tasks, entries, await read_adapters(self._store, document))

    def _report(self, record: RunRecord, status: RunStatus | None) -> RunReport:
        places = ReportPlaces(self.project.logs(record.run.id), Hub(Path(record.run.hub)).trusted)
        return report(record, places=places, status=status, now=self._clock.now(), damage=self.damage)

    async def runs(self) -> list[RunReport]:
        """Describe all runs of the project, the oldest first."""
        found = await self._store.list("run")
        started = sorted((one.value.get("started", 0.0), one.key.id) for one in found if not one.damaged)
        return [await self.status(run) for _, run in started]

    async def newest_run(self) -> str:
        """Return the id of the run that was started last."""
        runs = await self._store.list("run")
        if not runs and self.damage:
            what = f"no run can be read, the state log is damaged: {'; '.join(self.damage)}"
            raise RefusedError(what, "start a new run; what has landed stays landed")
        if not runs:
            raise RefusedError("there is no run in this project", "start one with `council run FILE`")
        return max(runs, key=lambda found: (found.value.get("started", 0.0), found.key.id)).key.id

    async def places(self) -> Places:
        """Say where everything is kept."""
        state, log, logs = self.project.state, self.project.log_file, self.project.all_logs
        if not await self._store.list("run"):
            return Places(None, state, log, logs, None, None)
        run = await read_run(self._store, await self.newest_run())
        hub = Hub(Path(run.hub))
        return Places(run.repo, state, log, logs, hub.objects.parent, hub.trusted)

    def records(self, after: int) -> AsyncGenerator[Record]:
        """Yield what is recorded behind a position of the log, of every run, as it happens."""
        return self._store.follow(after)

    @property
    def damage(self) -> tuple[str, ...]:
        """What of the state could not be read since it was opened, in words."""
        return tuple(
            f"{one.path}, byte {one.offset}: {one.what}"
            f" ({'anything older may be hit' if one.keys is None else ', '.join(map(str, one.keys)) or 'nothing lost'})"
            for one in self._store.damage
        )

    async def position(self) -> int:
        """Return the newest position of the log."""
        return await self._store.position()

    async def _hub(self, run: RunDocument) -> Hub:
        hub = Hub(Path(run.hub))
        # An attempt that was under way may have made its own folder anew, but nothing else.
        if not await anyio.to_thread.run_sync(hub.trusted.is_dir):
            raise RefusedError(f"the repositories of run {run.id} are gone from {hub.root}", "start a new run")
        return hub

    @property
    def archive(self) -> Archive:
        """What the tasks of the project's runs left."""
        return Archive(self.project, self._store, self._environ, self.is_live)

    async def is_live(self, run: str) -> bool:
        """Whether a process is at work in a run."""
        hub = await self._hub(await read_run(self._store, run))
        try:
            async with hub.lock(f"run-{run}").hold(0):
                return False
        except LockHeld:
            return True


def _is_at_work(run: str, held: LockHeld) -> RefusedError:
    remedy = "wait for it, or stop it with SIGINT"
    if not held.owner_lives:
        remedy = f"end what it left running: `fuser {held.path}` names it"
    return RefusedError(f"run {run} is at work under {held.holder}", remedy)


def make_configs(stored: Mapping[str, JsonObject]) -> dict[str, AdapterConfig]:
    """Return the adapters of a run by name, from what its document holds of them."""
    types = load_adapter_types()
    return {name: restore_adapter(name, entry, types) for name, entry in stored.items()}


def make_adapters(configs: Mapping[str, AdapterConfig]) -> dict[str, Adapter]:
    """Return the adapters that were configured, by name."""
    types = load_adapter_types()
    return {name: types[config.use](config.options) for name, config in configs.items()}


@asynccontextmanager
async def open_council(
    project: Project, *, clock: Clock | None = None, environ: Mapping[str, str] = os.environ
) -> AsyncIterator[Council]:
    """Open a project's state for the body of the `async with`."""
    clock = clock or SystemClock()
    await check_own(project, environ)
    await anyio.to_thread.run_sync(project.create)
    async with FileStore.open(project.state, clock) as store:
        yield Council(project, store, clock, environ)


async def project_of(config: RunConfig, environ: Mapping[str, str] = os.environ) -> Project:
    """Return the project of a config: its repository's checkout, or the file's folder where there is none."""
    site = await find_site(config.repo, is_url=config.is_url, environ=environ)
    if site.repository is None or site.repository.top is None:
        return Project(config.path.parent)
    return Project(site.repository.top)


def new_run_id(now: float) -> str:
    """Return a run id that sorts by time: date, time (UTC) and a few random characters."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
