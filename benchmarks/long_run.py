"""A project with the record of a long run, for benchmarks of readers.

It is created by the real recording code.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

import anyio

from orchestrator.domain.events.tasks import TaskChecking, TaskLanded, TaskLanding, TaskStarted
from orchestrator.domain.runs.model import Attempt, PreparedMerge, RunDocument
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.scheduling.claims import Role
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.run_settings import (
    AdapterConfig,
    Backoff,
    Check,
    CoordinationSettings,
    TaskSpec,
)
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import record_new_run
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.locking.orchestrators import RunMembership, create_owner
from orchestrator.project import Project
from orchestrator.repo.worktrees.hub import LivenessLocks
from orchestrator.state.log.identity import ensure_log
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import SystemClock

_AT_ONCE: Final = 64
_PROMPT: Final = "Rewrite the module so that it reads its options from one place, and test that.\n" * 8


def make_project(top: Path, tasks: int, home: Path) -> Path:
    """Create a repository with the record of a long run; return the log folder.

    The run is three quarters done: of every eight tasks four have landed, one of them at its second attempt, one has
    failed, one has changed nothing, and two were not started.
    """
    subprocess.run(["git", "init", "--quiet", "-b", "main", str(top)], check=True)  # noqa: S607  git of the PATH
    project = Project(top)
    project.create()
    log = ensure_log(project.state_folder, home)
    anyio.run(_record_run, project, log, tasks)
    return log


async def _record_run(project: Project, log: Path, tasks: int) -> None:
    top = project.top
    run, clock = "20260101-000000-0000", SystemClock()
    hub = top.parent / "hub"
    for folder in ("trusted.git", "locks"):
        (hub / folder).mkdir(parents=True)
    specs = {spec.id: spec for spec in map(_spec, range(tasks))}
    async with FileStore.open(log, clock) as store:
        await record_new_run(store, _document(run, top, hub, tuple(specs)), specs)
        others = RunMembership(
            store, clock, run, create_owner(Role.LEADER), CoordinationSettings(), LivenessLocks(hub / "locks").is_dead
        )
        ledger = await Ledger.take(store, clock, Redactor(frozenset()), others, "off")
        work = iter(specs)
        async with anyio.create_task_group() as group:
            for _ in range(_AT_ONCE):
                group.start_soon(_record_all, ledger, work, tasks)


def _spec(number: int) -> TaskSpec:
    return TaskSpec(
        id=f"task-{number:05d}",
        prompt=_PROMPT,
        needs=(f"task-{number - 1:05d}",) if number % 10 == 9 else (),
        adapter="agent",
        timeout=1800.0,
        attempts=3,
        backoff=Backoff(),
        idle_timeout=600.0,
        retry_on=frozenset(),
        checks=(Check(run="python3 -m pytest -q"),),
        checks_timeout=600.0,
        checks_env=(),
        max_file=10 << 20,
        priority=number % 3,
        owns=(f"src/module{number}/**",),
    )


def _document(run: str, top: Path, hub: Path, tasks: tuple[str, ...]) -> RunDocument:
    return RunDocument(
        id=run,
        config=str(top / "council.yaml"),
        repo=str(top),
        is_url=False,
        base="main",
        target=f"council/{run}",
        capacity=8,
        session_memory=1 << 30,
        adapters={"agent": AdapterConfig(use="command", options={"argv": ["agent"]})},
        tasks=tasks,
        start=_commit(0),
        hub=str(hub),
        started=1767225600.0,
    )


async def _record_all(ledger: Ledger, work: Iterator[str], tasks: int) -> None:
    for task in work:
        number = int(task.rpartition("-")[2])
        if number % 8 < 6:
            await _record(ledger, task, number, tasks)


async def _record(ledger: Ledger, task: str, number: int, tasks: int) -> None:
    failing = Trigger.FAIL if number % 8 == 4 else Trigger.FINISH_UNCHANGED if number % 8 == 5 else None
    ids = (_commit(number + tasks * step) for step in count(1))
    if number % 8 == 0:
        await _attempt(ledger, task, Trigger.RETRY, next(ids))
    await _attempt(ledger, task, failing or Trigger.BUILD, next(ids))
    if failing is None:
        old, new = next(ids), next(ids)
        await ledger.change(task, Trigger.CHECK, TaskChecking(merge=new))
        intent = PreparedMerge(old=old, new=new, recorded=1767225800.0)
        await ledger.change(task, Trigger.INTEND, TaskLanding(old=old, new=new), landing_intent=intent)
        await ledger.change(task, Trigger.LAND, TaskLanded(landed=new), landed=new, landing_intent=None, branch=None)


async def _attempt(ledger: Ledger, task: str, end: Trigger, commit: str) -> None:
    before = ledger.task(task).attempts
    attempt = Attempt(number=len(before) + 1, adapter="x", base=_commit(0), started=1767225600.5)
    await ledger.start(
        task, TaskUpdate(Trigger.START, TaskStarted(base=_commit(0), adapter="agent"), {"attempts": (*before, attempt)})
    )
    outcome = "built" if end is Trigger.BUILD else "no_change" if end is Trigger.FINISH_UNCHANGED else "crashed"
    branch = f"council/{ledger.run.id}/{task}/{attempt.number}"
    reason = None if end is Trigger.BUILD else "it ended with exit code 1: the options can't be read"
    ended = partial(ledger.task(task).with_attempt, ended=1767225700.25, outcome=outcome, reason=reason, branch=branch)
    changes = {"commit": commit} if end is Trigger.BUILD else {}
    fields = {"outcome": outcome, "branch": branch}
    event = end.event().replace(**fields)
    await ledger.change(task, end, event, attempts=ended(), branch=branch, reason=reason, **changes)


def _commit(number: int) -> str:
    return f"{number:040x}"
