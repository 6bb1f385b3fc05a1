"""A project with a synthetic run of two tasks: one landed, one failed and being retried."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.domain.events.runs import RunInterrupted, RunPaused
from orchestrator.domain.events.tasks import TaskLanded, TaskLanding, TaskQueued, TaskRetrying, TaskStarted
from orchestrator.domain.runs.model import Attempt, PreparedMerge, RunDocument
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.scheduling.claims import OrchestratorIdentity, Role
from orchestrator.domain.security.secrets import Redactor
from orchestrator.domain.settings.run_settings import AdapterConfig, Backoff, CoordinationSettings, TaskSpec
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.records import record_new_run
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.locking.orchestrators import RunMembership, create_owner
from orchestrator.project import Project, council_home
from orchestrator.protocols import Store
from orchestrator.state.log import journal
from orchestrator.state.log.identity import ensure_log
from orchestrator.state.stores.file import FileStore
from orchestrator.system.clock import Clock
from orchestrator.testing.clock import ManualClock

RUN = "20260102-030405-ab12"
#: 2026-01-02 03:04:05 UTC.
RUN_STARTED = 1767323045.0
OLD_COMMIT, NEW_COMMIT = "0" * 40, "4f0c2d1e9b" * 4
#: Its active process, on a machine without contact.
OWNER = OrchestratorIdentity(
    id="box-4711-9b3e50",
    host="box",
    boot="5f0a7c1e-2b7d-4f5e-9a3c-6d1b8e4f2a90",
    pid=4711,
    started=90210,
    role=Role.LEADER,
)


def run_document(folder: Path, run: str = RUN, started: float = RUN_STARTED) -> RunDocument:
    """Return a run of the tasks `models` and `api`, whose repositories do not exist."""
    return RunDocument(
        id=run,
        config="council.yaml",
        repo="/home/ada/shop",
        is_url=False,
        base="main",
        target="main",
        capacity=2,
        session_memory=1,
        adapters={"fixer": AdapterConfig(use="command", options={"argv": ["fixer"]})},
        tasks=("models", "api"),
        start=OLD_COMMIT,
        hub=str(folder / "hub"),
        started=started,
    )


def task_spec(task: str, prompt: str) -> TaskSpec:
    """Return a task of the fixer, as read from a minimal file."""
    return TaskSpec(
        id=task,
        prompt=prompt,
        needs=(),
        adapter="fixer",
        timeout=1800.0,
        attempts=3,
        backoff=Backoff(initial=2.0, factor=2.0, max=300.0, jitter=False),
        idle_timeout=None,
        retry_on=frozenset(),
        checks=(),
        checks_timeout=600.0,
        checks_env=(),
        max_file=1 << 20,
        priority=0,
        owns=(),
    )


def make_orchestrators(
    store: Store, clock: Clock, run: str, *, alone: bool = True, me: OrchestratorIdentity | None = None
) -> RunMembership:
    """Return the orchestrators of a run as seen by `me`, or by a process with a unique name; `alone`:

    others are dead.
    """

    async def is_dead(run: str, owner: OrchestratorIdentity) -> bool:
        return alone

    return RunMembership(store, clock, run, me or create_owner(Role.LEADER), CoordinationSettings(), is_dead)


async def record_run(
    store: Store, clock: ManualClock, run: RunDocument, me: OrchestratorIdentity | None = None
) -> None:
    """Record a run in eleven commits as `me`: `models` lands after 90 s, `api` fails once and is retried."""
    await record_new_run(
        store, run, {"models": task_spec("models", "Add a User model."), "api": task_spec("api", "Add an API.")}
    )
    others = make_orchestrators(store, clock, run.id, me=me)
    ledger = await Ledger.take(store, clock, Redactor(()), others, "bubblewrap")
    for task in ("models", "api"):
        clock.advance(5)
        attempt = Attempt(number=1, adapter="fixer", base=OLD_COMMIT, started=clock.now())
        assert await ledger.start(
            task, TaskUpdate(Trigger.START, TaskStarted(base=OLD_COMMIT, adapter="fixer"), {"attempts": (attempt,)})
        )
    clock.advance(30)
    failed = TaskRetrying(outcome="crashed", reason="it ended with 1", branch=None, retry_in=2.0)
    tried = ledger.task("api").with_attempt(ended=clock.now(), outcome="crashed", reason="it ended with 1")
    await ledger.change("api", Trigger.RETRY, failed, attempts=tried, failures=1)
    clock.advance(53)
    branch = f"council/{run.id}/models/1"
    spent: dict[str, Any] = {"input_tokens": 12_000, "output_tokens": 800, "cost": 0.12}
    built = ledger.task("models").with_attempt(ended=clock.now(), outcome="built", branch=branch, **spent)
    await ledger.change(
        "models", Trigger.BUILD, TaskQueued(branch=branch), attempts=built, commit=NEW_COMMIT, branch=branch
    )
    intent = PreparedMerge(old=OLD_COMMIT, new=NEW_COMMIT, recorded=clock.now())
    await ledger.change("models", Trigger.INTEND, TaskLanding(old=OLD_COMMIT, new=NEW_COMMIT), landing_intent=intent)
    clock.advance(2)
    await ledger.change(
        "models", Trigger.LAND, TaskLanded(landed=NEW_COMMIT), landing_intent=None, landed=NEW_COMMIT, branch=None
    )
    clock.advance(1)
    again = Attempt(number=2, adapter="fixer", base=NEW_COMMIT, started=clock.now())
    attempts = (*ledger.task("api").attempts, again)
    assert await ledger.start(
        "api", TaskUpdate(Trigger.START, TaskStarted(base=NEW_COMMIT, adapter="fixer"), {"attempts": attempts})
    )
    clock.advance(9)
    await ledger.note(RunPaused(reason="memory is low", retry_in=5.0))
    await ledger.note(RunInterrupted())


@asynccontextmanager
async def recorded_project(
    top: Path, monkeypatch: pytest.MonkeyPatch, folder: Path | None = None
) -> AsyncIterator[FileStore]:
    """Create a project with that run, recorded by ada@box:4711; yield its store.

    The run's repositories are in `folder`, whose name is recorded: sizes depend on its length.
    """
    monkeypatch.setattr(journal, "get_writer_name", lambda: "ada@box:4711")
    clock = ManualClock(RUN_STARTED)
    (top / ".council").mkdir(mode=0o700)
    async with FileStore.open(ensure_log(Project(top).state_folder, council_home(os.environ)), clock) as store:
        await record_run(store, clock, run_document(folder or top), OWNER)
        yield store
