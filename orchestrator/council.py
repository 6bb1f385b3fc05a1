"""The composition root: opens the store, finds the repository, and puts a run's parts together."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import anyio.to_thread

from orchestrator.clock import Clock, SystemClock
from orchestrator.config.model import RunConfig, restore_adapter
from orchestrator.domain.dispatch import Board
from orchestrator.domain.model import RunDocument, TaskDocument
from orchestrator.engine.ledger import Ledger, read_needs, read_run, read_tasks, seed
from orchestrator.engine.preflight import Site, check_branches, check_checkout, check_programs, find_site
from orchestrator.engine.recovery import recover
from orchestrator.engine.report import ReportPlaces, RunReport, RunStatus, report
from orchestrator.engine.scheduler import Scheduler, Workshop
from orchestrator.errors import LockHeld, RefusedError
from orchestrator.filelock import HeldLock
from orchestrator.plugins import load_adapter_types
from orchestrator.project import Project, council_home, exclude_from_git
from orchestrator.protocols import Adapter, JsonObject, Record
from orchestrator.repo.git import Git
from orchestrator.repo.hub import Hub, create_hub, hub_of, internal_ref
from orchestrator.repo.landing import Target
from orchestrator.repo.source import Source
from orchestrator.state.file import FileStore

#: Seconds that a killed owner's last git commands get to end before a resume gives up waiting for them.
HANDOVER_LIMIT = 60.0

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
        if site.repository is not None and site.repository.top is not None:
            await anyio.to_thread.run_sync(exclude_from_git, site.repository.git_dir)
        run = new_run_id(self._clock.now())
        target = config.target or f"council/{run}"
        adapters = {name: entry.stored() for name, entry in config.adapters.items()}
        used = {task.adapter for task in config.tasks}
        check_programs(make_adapters({name: entry for name, entry in adapters.items() if name in used}), self._environ)
        home = council_home(self._environ)
        if site.repository and site.repository.top and home.is_relative_to(site.repository.top):
            raise RefusedError(f"{home} is inside the repository", "set COUNCIL_HOME to a folder outside of it")
        hub = hub_of(site.identity, home)
        heads = await check_branches(self._source(site, Git(None, environ=self._environ)), config.base, target)
        await check_checkout(site.repository, target, self._environ, allow_deferred=allow_deferred)
        await create_hub(hub, site.object_format, self._environ)
        source = self._source(site, Git(hub.trusted, environ=self._environ))
        start = await source.fetch(target if target in heads else config.base, internal_ref(run, "start"))
        if target in heads:
            await self._check_related(hub, source, config.base, target, start, run)
        document = RunDocument(
            id=run,
            config=str(config.path),
            repo=config.repo,
            is_url=config.is_url,
            base=config.base,
            target=target,
            capacity=config.capacity,
            adapters=adapters,
            tasks=tuple(task.id for task in config.tasks),
            start=start,
            hub=str(hub.root),
            started=self._clock.now(),
        )
        await seed(self._store, document, {task.id: task for task in config.tasks})
        return run

    async def _check_related(self, hub: Hub, source: Source, base: str, target: str, start: str, run: str) -> None:
        tip = await source.fetch(base, internal_ref(run, "base"))
        git = Git(hub.trusted, environ=self._environ)
        if (await git("merge-base", tip, start, ok=(0, 1))).returncode:
            raise RefusedError(f"{base!r} and {target!r} have no history in common", "set `base` or `target` anew")

    async def execute(self, run: str) -> RunReport:
        """Take a run to its end, from wherever it stands, and report. Only one process can do that at a time."""
        document = await read_run(self._store, run)
        hub = await self._hub(document)
        try:
            async with self._ownership(hub, run) as lock:
                return await self._work(document, hub, lock.fd)
        except LockHeld as held:
            remedy = "wait for it, or stop it with SIGINT"
            if not held.owner_lives:
                remedy = f"end what it left running: `fuser {held.path}` names it"
            raise RefusedError(f"run {run} is at work under {held.holder}", remedy) from None

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

    async def _work(self, document: RunDocument, hub: Hub, lock_fd: int) -> RunReport:
        run = document.id
        needs = await read_needs(self._store, document)
        before = await self._documents(document)
        statuses = {task: one.status for task, one in before.items()}
        if document.ended and Board.of(needs, statuses).is_over(statuses):
            return self._report(document, before, needs, None)
        ledger = await Ledger.take(self._store, self._clock, run)
        shop = await self._workshop(document, hub, lock_fd)
        await recover(ledger, shop, self._clock)
        self._scheduler = Scheduler(ledger, shop, Board.of(needs, ledger.statuses()), self._clock)
        if self._stopping:
            self._scheduler.stop()
        finished = await self._scheduler.run()
        status = None if finished else RunStatus.INTERRUPTED
        result = self._report(document, {task: ledger.task(task) for task in document.tasks}, needs, status)
        await (ledger.finish(result.status) if finished else ledger.note("run.interrupted", {}))
        return result

    def stop(self) -> None:
        """End the run under way cleanly: sessions are stopped, what they did is kept, `resume` goes on from there."""
        self._stopping = True
        if self._scheduler is not None:
            self._scheduler.stop()

    async def status(self, run: str) -> RunReport:
        """Describe a run as it stands now."""
        document = await read_run(self._store, run)
        documents, needs = await self._documents(document), await read_needs(self._store, document)
        status = None
        if document.ended is None:
            alive = await self._is_owned(await self._hub(document), run)
            status = RunStatus.RUNNING if alive else RunStatus.INTERRUPTED
        return self._report(document, documents, needs, status)

    def _report(
        self,
        run: RunDocument,
        tasks: Mapping[str, TaskDocument],
        needs: Mapping[str, Sequence[str]],
        status: RunStatus | None,
    ) -> RunReport:
        places = ReportPlaces(self.project.logs(run.id), Hub(Path(run.hub)).trusted)
        return report(run, tasks, needs, places=places, status=status, damage=self.damage)

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

    async def _documents(self, run: RunDocument) -> dict[str, TaskDocument]:
        found = await read_tasks(self._store, run.id)
        return {task: TaskDocument.model_validate(found[task].value) for task in run.tasks}

    async def _hub(self, run: RunDocument) -> Hub:
        hub = Hub(Path(run.hub))
        if not await anyio.to_thread.run_sync(hub.root.is_dir):
            raise RefusedError(f"the repositories of run {run.id} are gone from {hub.root}", "start a new run")
        return hub

    async def _is_owned(self, hub: Hub, run: str) -> bool:
        try:
            async with hub.lock(f"run-{run}").hold(0):
                return False
        except LockHeld:
            return True

    def _source(self, site: Site, git: Git) -> Source:
        return Source.of(site.location, is_local=site.repository is not None, git=git)

    async def _workshop(self, document: RunDocument, hub: Hub, lock_fd: int) -> Workshop:
        site = await find_site(document.repo, is_url=document.is_url, environ=self._environ)
        git = Git(hub.trusted, keep_fds=(lock_fd,), environ=self._environ)
        source = self._source(site, git)
        ref = internal_ref(document.id, "target")
        target = Target(hub, git, source, site.repository, branch=document.target, start=document.start, ref=ref)
        logs = self.project.logs(document.id)
        await anyio.to_thread.run_sync(lambda: logs.mkdir(mode=0o700, exist_ok=True))
        return Workshop(hub, git, source, target, make_adapters(document.adapters), logs, self._environ)


def make_adapters(stored: Mapping[str, JsonObject]) -> dict[str, Adapter]:
    """Return the adapters of a run by name, from what its document holds of them."""
    types = load_adapter_types()
    configs = [restore_adapter(name, entry, types) for name, entry in stored.items()]
    return {config.name: types[config.use](config.options) for config in configs}


@asynccontextmanager
async def open_council(
    project: Project, *, clock: Clock | None = None, environ: Mapping[str, str] = os.environ
) -> AsyncIterator[Council]:
    """Open a project's state for the body of the `async with`."""
    clock = clock or SystemClock()
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
