"""Verify a run's workflow records by the rules of `domain.workflow.verification`.

Read-only, and safe while the run is active: the documents of a task are read as of one point in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import anyio.to_thread
from pydantic import ValidationError

from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.sessions.contexts import SessionContext
from orchestrator.domain.workflow.handoff_kinds import HandoffKind
from orchestrator.domain.workflow.handoffs import Handoff
from orchestrator.domain.workflow.phase_context import get_handoff_kind
from orchestrator.domain.workflow.routing import Workflow
from orchestrator.domain.workflow.verification import Constraint, WorkflowRecord, check_workflow
from orchestrator.domain.workflow.violations import Violation
from orchestrator.engine.session_api.contexts import read_contexts
from orchestrator.engine.state.records import read_handoffs, read_run, task_key
from orchestrator.errors import GitError, PluginFailed, RefusedError, plugin_code
from orchestrator.protocols import JsonObject, Store
from orchestrator.repo.git.blobs import compute_checksums
from orchestrator.repo.git.command import Git
from orchestrator.repo.worktrees.hub import find_hub
from orchestrator.system.clock import Clock

_REPAIR = "run `council state verify --repair` to keep the readable part"
_FOREIGN_WRITER = "not written by `council`: restore an earlier state with `council checkpoint restore CHECKPOINT`"


@dataclass(frozen=True, slots=True)
class TaskVerification:
    """The verification result of one task that has a workflow."""

    id: str
    workflow: str
    visits: int = 0
    """The number of recorded phase visits."""
    handoffs: int = 0
    violations: Sequence[Violation] = ()
    skipped_checks: Sequence[str] = ()
    """Files that could not be checked, with reasons."""

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RunVerification:
    """The verification result of a run; `tasks` are those that have a workflow."""

    run: str
    tasks: Sequence[TaskVerification] = ()

    @property
    def violations(self) -> list[Violation]:
        """The violations of all tasks."""
        return [violation for task in self.tasks for violation in task.violations]

    @property
    def is_valid(self) -> bool:
        """Whether there are no violations."""
        return not self.violations

    def to_json(self) -> JsonObject:
        """Return the object for `--json`."""
        return {"run": self.run, "is_valid": self.is_valid, "tasks": [task.to_json() for task in self.tasks]}


@dataclass(frozen=True, slots=True)
class _RunVerifier:
    """Verifies the tasks of one run at one point in time."""

    store: Store
    run: RunDocument
    kinds: Mapping[str, HandoffKind]
    constraints: Mapping[str, Constraint]
    git: Git | None
    """Runs in the trusted repository; None if the run's repositories were removed."""
    sessions: Sequence[SessionContext]
    now: float

    async def verify_task(self, task: str, workflow: str) -> TaskVerification:
        """Verify a task by the name of its workflow."""
        subject = f"task {task!r}"
        if workflow not in self.run.workflows:
            message = f"its workflow {workflow!r} is not in the run's record"
            violation = Violation("records.workflow", subject, message, _FOREIGN_WRITER)
            return TaskVerification(task, workflow, violations=[violation])
        try:
            return await self._check_rules(task, workflow)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            message = f"its record is not a valid {error.title}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            violation = Violation("records.form", subject, message, _FOREIGN_WRITER)
        except RefusedError as error:
            violation = Violation("records.damaged", subject, error.message, error.remedy)
        return TaskVerification(task, workflow, violations=[violation])

    async def _check_rules(self, task: str, name: str) -> TaskVerification:
        workflow = Workflow(self.run.workflows[name])
        document, handoffs = await self._read_records(task)
        facts = WorkflowRecord(
            run=self.run.id,
            task=task,
            workflow=workflow,
            document=document,
            handoffs=handoffs,
            sessions=[session for session in self.sessions if session.task == task],
            kinds=self.kinds,
            now=self.now,
        )
        sums, skipped_checks = await self._checksums(facts)
        violations = check_workflow(replace(facts, checksums=sums), self.constraints)
        return TaskVerification(task, name, len(document.phases), len(handoffs), violations, skipped_checks)

    async def _read_records(self, task: str) -> tuple[TaskDocument, dict[str, Handoff]]:
        """Read a task and its handoffs consistently.

        Each handoff is written with a new version of its task.
        """
        key = task_key(self.run.id, task)
        while True:
            before = await self.store.get(key)
            if before is None:
                raise RefusedError("its record is missing", _REPAIR)
            if before.damaged:
                raise RefusedError("its record is damaged in the state log", _REPAIR)
            handoffs = await read_handoffs(self.store, self.run.id, task)
            after = await self.store.get(key)
            if after is not None and after.version == before.version:
                document = TaskDocument.model_validate_json(before.encoded)
                return document, {name: handoff for name, (_, handoff) in handoffs.items()}

    async def _checksums(self, facts: WorkflowRecord) -> tuple[dict[str, dict[str, str | None]], list[str]]:
        """Return file checksums by handoff, and the reasons for unchecked files.

        Checksums are computed at the final commits of the visits.
        """
        checksums: dict[str, dict[str, str | None]] = {}
        skipped_checks: list[str] = []
        for visit, phase, record in facts.visits:
            handoff = None if record.handoff is None else facts.handoffs.get(record.handoff)
            kind = get_handoff_kind(phase, self.kinds)
            if handoff is None or kind is None or record.commit is None:
                continue
            try:
                with plugin_code():
                    paths = kind.paths(handoff.data)
            except PluginFailed as failed:
                skipped_checks.append(f"{visit}: handoff files can't be listed: {failed}")
                continue
            if not paths:
                continue
            if self.git is None:
                skipped_checks.append(f"{visit}: handoff files: the run's repositories were removed")
                continue
            try:
                checksums[handoff.id] = await compute_checksums(self.git, record.commit, paths)
            except GitError:
                skipped_checks.append(f"{visit}: handoff files: commit {record.commit[:12]} not found")
        return checksums, skipped_checks


async def verify_run(
    store: Store,
    run: str,
    kinds: Mapping[str, HandoffKind],
    constraints: Mapping[str, Constraint],
    clock: Clock,
    environ: Mapping[str, str],
) -> RunVerification:
    """Verify each task with a workflow; raise RefusedError if the run does not exist."""
    # Sessions first: everything they refer to is recorded before the other documents are read.
    sessions, now = await read_contexts(store, run), clock.now()
    document = await read_run(store, run)
    if not document.workflows:
        return RunVerification(run)
    trusted = find_hub(document, environ).trusted
    has_repository = await anyio.to_thread.run_sync(trusted.is_dir)
    git = Git(trusted, environ=environ) if has_repository else None
    verifier = _RunVerifier(store, document, kinds, constraints, git, sessions, now)
    specs = {spec.key.id.partition("/")[2]: spec for spec in await store.list("spec", f"{run}/")}
    tasks = []
    for task in document.tasks:
        spec = specs.get(task)
        if spec is None or spec.damaged:
            violation = Violation("records.damaged", f"task {task!r}", "its specification is unreadable", _REPAIR)
            tasks.append(TaskVerification(task, "", violations=[violation]))
        elif (workflow := spec.value.get("workflow")) is not None:
            tasks.append(await verifier.verify_task(task, workflow))
    return RunVerification(run, tasks)
