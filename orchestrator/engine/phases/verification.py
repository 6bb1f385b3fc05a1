"""Holds what is recorded of a run's workflows against the rules: gathers the facts that `domain.workflow.verification` judges.

It only looks, also while the run is at work: what belongs together of a task is read as of one moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import anyio.to_thread
from pydantic import ValidationError

from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.sessions.contexts import SessionContext
from orchestrator.domain.workflow.handoff_kinds import HandoffKind
from orchestrator.domain.workflow.handoffs import Handoff
from orchestrator.domain.workflow.phase_context import get_handoff_kind
from orchestrator.domain.workflow.routing import Phase, Workflow
from orchestrator.domain.workflow.verification import Constraint, WorkflowRecord, check_workflow
from orchestrator.domain.workflow.violations import Violation, describe_exception
from orchestrator.engine.session_api.contexts import read_contexts
from orchestrator.engine.state.records import read_handoffs, read_run, task_key
from orchestrator.errors import GitError, RefusedError
from orchestrator.protocols import JsonObject, Store
from orchestrator.repo.git.checksums import compute_checksums
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.hub import Hub
from orchestrator.system.clock import Clock

_REPAIR = "`council state verify --repair` restores the readable state"
_FOREIGN_WRITER = "something else than `council` has written it: `council checkpoint restore` goes back to how it was"


@dataclass(frozen=True, slots=True)
class TaskVerification:
    """What became of the rules for one task that has a workflow."""

    id: str
    workflow: str
    visits: int = 0
    """How many visits of phases are recorded."""
    handoffs: int = 0
    violations: Sequence[Violation] = ()
    unseen: Sequence[str] = ()
    """What could not be looked at, and why."""

    def to_json(self) -> JsonObject:
        """Return the object that programs get."""
        return {
            "id": self.id,
            "workflow": self.workflow,
            "visits": self.visits,
            "handoffs": self.handoffs,
            "violations": [one.to_json() for one in self.violations],
            "unseen": list(self.unseen),
        }


@dataclass(frozen=True, slots=True)
class RunVerification:
    """What became of the rules for a run; `tasks` are those that have a workflow."""

    run: str
    tasks: Sequence[TaskVerification] = ()

    @property
    def violations(self) -> list[Violation]:
        """All of them."""
        return [violation for task in self.tasks for violation in task.violations]

    @property
    def is_sound(self) -> bool:
        """Whether no rule is broken."""
        return not self.violations

    def to_json(self) -> JsonObject:
        """Return the object that programs get."""
        return {"run": self.run, "is_sound": self.is_sound, "tasks": [one.to_json() for one in self.tasks]}


@dataclass(frozen=True, slots=True)
class _RunVerifier:
    """One look at the workflows of a run."""

    store: Store
    run: RunDocument
    kinds: Mapping[str, HandoffKind]
    constraints: Mapping[str, Constraint]
    git: Git | None
    """None: the repositories are gone."""
    sessions: Sequence[SessionContext]
    now: float

    async def task(self, task: str, name: str) -> TaskVerification:
        """Return what becomes of the rules for a task whose workflow is called `name`."""
        place = f"task {task!r}"
        if name not in self.run.workflows:
            what = f"its workflow {name!r} is not in the run's record"
            return TaskVerification(
                task, name, violations=[Violation("records.workflow", place, what, _FOREIGN_WRITER)]
            )
        try:
            return await self._judged(task, name)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False)[0]
            what = f"what is recorded is no {error.title}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
            return TaskVerification(task, name, violations=[Violation("records.form", place, what, _FOREIGN_WRITER)])
        except RefusedError as error:
            return TaskVerification(
                task, name, violations=[Violation("records.damaged", place, error.what, error.remedy)]
            )

    async def _judged(self, task: str, name: str) -> TaskVerification:
        workflow = Workflow(tuple(map(Phase.model_validate, self.run.workflows[name])))
        document, handoffs = await self._recorded(task)
        facts = WorkflowRecord(
            run=self.run.id,
            task=task,
            workflow=workflow,
            document=document,
            handoffs=handoffs,
            sessions=[one for one in self.sessions if one.task == task],
            kinds=self.kinds,
            now=self.now,
        )
        sums, unseen = await self._checksums(facts)
        violations = check_workflow(replace(facts, checksums=sums), self.constraints)
        return TaskVerification(task, name, len(document.phases), len(handoffs), violations, unseen)

    async def _recorded(self, task: str) -> tuple[TaskDocument, dict[str, Handoff]]:
        """Read what belongs together: a handoff is written with a new version of its task, and never without."""
        key = task_key(self.run.id, task)
        while True:
            before = await self.store.get(key)
            if before is None:
                raise RefusedError("nothing is recorded any more of how it stands", _REPAIR)
            if before.damaged:
                raise RefusedError("its record is damaged in the state log", _REPAIR)
            handoffs = await read_handoffs(self.store, self.run.id, task)
            after = await self.store.get(key)
            if after is not None and after.version == before.version:
                document = TaskDocument.model_validate_json(before.encoded)
                return document, {name: handoff for name, (_, handoff) in handoffs.items()}

    async def _checksums(self, facts: WorkflowRecord) -> tuple[dict[str, dict[str, str | None]], list[str]]:
        """Return the checksums of the files that handoffs name, by handoff, and what could not be looked at.

        They are those of the commits that the visits ended with.
        """
        found: dict[str, dict[str, str | None]] = {}
        unseen: list[str] = []
        for place, phase, record in facts.visits:
            handoff = None if record.handoff is None else facts.handoffs.get(record.handoff)
            kind = get_handoff_kind(phase, self.kinds)
            if handoff is None or kind is None or record.commit is None:
                continue
            try:
                paths = kind.paths(handoff.data)
            except Exception as error:
                unseen.append(
                    f"{place}: files that were handed over: its kind can't name them: {describe_exception(error)}"
                )
                continue
            if not paths:
                continue
            if self.git is None:
                unseen.append(f"{place}: files that were handed over: the run's repositories are gone")
                continue
            try:
                found[handoff.id] = await compute_checksums(self.git, record.commit, paths)
            except GitError:
                unseen.append(f"{place}: files that were handed over: commit {record.commit[:12]} is gone")
        return found, unseen


async def verify_run(
    store: Store,
    run: str,
    kinds: Mapping[str, HandoffKind],
    constraints: Mapping[str, Constraint],
    clock: Clock,
    environ: Mapping[str, str],
) -> RunVerification:
    """Return what becomes of the rules for each task of a run that has a workflow; RefusedError without such a run."""
    # First: what these know of is recorded by the time that the rest is read.
    sessions, now = await read_contexts(store, run), clock.now()
    document = await read_run(store, run)
    if not document.workflows:
        return RunVerification(run)
    trusted = Hub(Path(document.hub)).trusted
    is_there = await anyio.to_thread.run_sync(trusted.is_dir)
    git = Git(trusted, environ=environ) if is_there else None
    looking = _RunVerifier(store, document, kinds, constraints, git, sessions, now)
    specs = {one.key.id.partition("/")[2]: one for one in await store.list("spec", f"{run}/")}
    tasks = []
    for task in document.tasks:
        spec = specs.get(task)
        if spec is None or spec.damaged:
            what = "what it was asked to do can't be read"
            tasks.append(
                TaskVerification(task, "", violations=[Violation("records.damaged", f"task {task!r}", what, _REPAIR)])
            )
        elif (workflow := spec.value.get("workflow")) is not None:
            tasks.append(await looking.task(task, workflow))
    return RunVerification(run, tasks)
