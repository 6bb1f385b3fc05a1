"""A run's tasks as seen by one orchestrator: documents, workflows and handoffs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import anyio

from orchestrator.domain.runs.model import RunDocument, TaskDocument
from orchestrator.domain.runs.statuses import CLAIMED_STATUSES
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.workflow.handoffs import Handoff
from orchestrator.domain.workflow.routing import Workflow
from orchestrator.engine.state.records import (
    handoff_key,
    parse_entry,
    read_handoffs,
    read_run_with_tasks,
    read_spec,
    spec_key,
    task_documents,
    task_key,
)
from orchestrator.engine.state.run_state import RunState
from orchestrator.locking.claims import Claims
from orchestrator.protocols import Document, JsonObject, Key, Store, Write

if TYPE_CHECKING:
    from orchestrator.domain.settings.run_settings import TaskSpec


class LoadedRun(NamedTuple):
    """The documents of a run and its tasks as of one commit."""

    run: RunDocument
    stored: Mapping[str, Document]
    tasks: Mapping[str, TaskDocument]


async def load_run(store: Store, run: str, known: LoadedRun | None = None) -> LoadedRun:
    """Read and validate a run and its tasks; `known` tasks are not parsed again."""
    document, stored = await read_run_with_tasks(store, run)
    if known is not None and _versions(document, stored) == _versions(known.run, known.stored):
        return LoadedRun(document, stored, known.tasks)
    return LoadedRun(document, stored, task_documents(stored, document.tasks))


def _versions(run: RunDocument, stored: Mapping[str, Document]) -> list[tuple[str, int]]:
    return [(task, stored[task].version) for task in run.tasks if task in stored]


class TaskTable:
    """The documents of a run's tasks, including changes by other orchestrators."""

    def __init__(self, store: Store, run: RunState, loaded: LoadedRun, claims: Claims | None) -> None:
        self.damaged = frozenset(task for task, document in loaded.stored.items() if document.damaged)
        self.added: dict[str, DispatchEntry] = {}
        """Dispatch entries of subtasks created from plans since loading."""
        self._store, self._run, self._claims = store, run, claims
        self._documents = dict(loaded.tasks)
        self._versions = {task: loaded.stored[task].version for task in loaded.run.tasks}
        self._planners = {part: task for task, document in self._documents.items() for part in document.subtasks}
        """The planning task of each subtask."""
        self._in_flight: dict[str, anyio.Event] = {}
        """Tasks that this orchestrator is changing, each with an event that is set afterwards."""
        self._unreported: dict[str, TaskDocument] = {}
        """Earlier states of tasks that others have changed, which the change feed has yet to report."""

    def __getitem__(self, task: str) -> TaskDocument:
        return self._documents[task]

    def __contains__(self, task: object) -> bool:
        """Return True if a task is known.

        Subtasks of other processes are known only after they are read.
        """
        return task in self._versions

    def version(self, task: str) -> int:
        """Return the known version of a task's document."""
        return self._versions[task]

    def documents(self) -> Mapping[str, TaskDocument]:
        """Return the current state of every task."""
        return self._documents

    def has_moved_target(self, start: str) -> bool:
        """Return True if the run has updated the target since `start`.

        True implies that the target has existed.
        """
        return any(document.landed not in {None, start} for document in self._documents.values())

    def subtasks(self, task: str) -> tuple[str, ...]:
        """Return the known subtasks from the plan of a task."""
        return tuple(part for part in self._documents[task].subtasks if part in self._versions)

    def planning_task(self, task: str) -> str | None:
        """Return the task whose plan created a subtask; None for other tasks."""
        return self._planners.get(task)

    def plan_members(self, task: str) -> list[str]:
        """Return a task with all tasks of the same plan, including nested plans.

        A task without a plan is returned alone.
        """
        while task in self._planners:
            task = self._planners[task]
        members = [task]
        for member in members:
            members += self.subtasks(member)
        return members

    async def is_landing_intent(self, commit: str) -> bool:
        """Return True if a commit is a recorded landing intent of any task in the store."""
        if any(commit in document.intended_merges for document in self._documents.values()):
            return True
        documents = [document for document in await self._store.list("task") if commit.encode() in document.encoded]
        return any(
            commit in document.value.get("intended_merges", ()) for document in documents if not document.damaged
        )

    async def load_new(self) -> bool:
        """Load the subtasks that other processes have added; return True if there are any."""
        _, document = await self._run.read()
        has_new = False
        for task in document.tasks:
            if task not in self._versions:
                stored = await self._store.get(task_key(document.id, task))
                spec = await self._store.get(spec_key(document.id, task))
                if stored is None or spec is None or task in self._versions:
                    continue
                loaded = TaskDocument.model_validate_json(stored.encoded)
                self.add(task, stored.version, loaded, parse_entry(spec.value))
                if stored.version > 1:
                    self._unreported[task] = TaskDocument()
                has_new = True
        self._run.adopt(document)
        return has_new

    def add(self, task: str, version: int, document: TaskDocument, entry: DispatchEntry) -> None:
        """Add a subtask."""
        self._run.loaded.add(task)
        self._documents[task], self._versions[task] = document, version
        self._planners |= dict.fromkeys(document.subtasks, task)
        self.added[task] = entry

    async def refresh(self, task: str, *, released: bool = True) -> bool:
        """Reload a task; return True if it changed.

        Unless `released`, keep its claim even if the task no longer needs one.
        """
        stored = await self._store.get(task_key(self._run.document.id, task))
        if stored is None or stored.version <= self._versions[task]:
            return False
        self._unreported.setdefault(task, self._documents[task])
        self.apply(task, stored.version, TaskDocument.model_validate_json(stored.encoded), released=released)
        return True

    def apply(self, task: str, version: int, after: TaskDocument, *, released: bool = True) -> None:
        """Apply a stored document unless a later one is known."""
        if version > self._versions[task]:
            self._documents[task], self._versions[task] = after, version
            self._planners |= dict.fromkeys(after.subtasks, task)
        if released and self._claims is not None and after.status not in CLAIMED_STATUSES:
            self._claims.mark_released(task)

    def apply_own(self, task: str, after: TaskDocument) -> None:
        """Apply a document that this orchestrator has committed."""
        self._unreported.pop(task, None)
        self.apply(task, self._versions[task] + 1, after)

    def take_unreported(self, task: str) -> TaskDocument | None:
        """Return a task's state before an unreported change, and mark it as reported."""
        return self._unreported.pop(task, None)

    def is_news(self, task: str, version: int) -> bool:
        """Return True if a stored task version is unknown, or its change unreported."""
        known = self._versions.get(task, version)
        return version > known or (version == known and task in self._unreported)

    @contextmanager
    def delay_reports(self, tasks: Iterable[str]) -> Iterator[None]:
        """Delay the reporting of changes of tasks while the body changes them itself."""
        done = anyio.Event()
        names = list(tasks)
        self._in_flight.update(dict.fromkeys(names, done))
        try:
            yield
        finally:
            for name in names:
                if self._in_flight.get(name) is done:
                    del self._in_flight[name]
            done.set()

    async def wait_settled(self, task: str) -> None:
        """Wait until this orchestrator is not changing a task."""
        while (done := self._in_flight.get(task)) is not None:
            await done.wait()


class TaskDefinitions:
    """The specifications, workflows and handoffs of a run's tasks."""

    def __init__(self, store: Store, run: RunState, max_attempts: int) -> None:
        """Create definitions that limit the attempts of each task to `max_attempts`."""
        self._store, self._run, self._max_attempts = store, run, max_attempts
        self._workflows: dict[str, Workflow] = {}

    async def spec(self, task: str) -> TaskSpec:
        """Return the specification of a task, with `attempts` limited by `max_retries`."""
        spec = await read_spec(self._store, self._run.document.id, task)
        if spec.attempts <= self._max_attempts:
            return spec
        return spec.model_copy(update={"attempts": self._max_attempts})

    def workflow(self, name: str | None) -> Workflow:
        """Return a workflow by name; for None, the default workflow of a task without one."""
        if name is None:
            return Workflow()
        if name not in self._workflows:
            phases = self._run.document.workflows[name]
            self._workflows[name] = Workflow(phases)
        return self._workflows[name]

    async def handoffs(self, task: str) -> dict[str, tuple[int, Handoff]]:
        """Return the handoffs of a task by id, each with the version of its document."""
        return await read_handoffs(self._store, self._run.document.id, task)

    async def earlier_specs(self, task: str) -> dict[str, JsonObject]:
        """Return all recorded specifications of a task's subtasks, by name.

        Those of earlier plans are included.
        """
        documents = await self._store.list("spec", f"{self._run.document.id}/{task}")
        return {document.key.id.partition("/")[2]: document.value for document in documents if not document.damaged}

    async def have_any_existed(self, names: Iterable[str]) -> bool:
        """Return True if any name was ever used for a task, including deleted tasks."""
        for name in names:
            if await self._store.history(Key("spec", f"{self._run.document.id}/{name}"), 1):
                return True
        return False


def handoff_write(handoff: Handoff, version: int = 0) -> Write:
    """Return the write that records a handoff."""
    return Write(handoff_key(handoff.id), version, handoff.model_dump(mode="json"))
