"""Create tasks from the plan of a phase, and record them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from orchestrator.domain.events.tasks import TaskExpanded
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.runs.statuses import SUCCESS_STATUSES
from orchestrator.domain.settings.phase_settings import ExpansionSettings, Phase
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.expansion import ExpandedTask, expand_plan
from orchestrator.domain.workflow.handoffs import handoff_id
from orchestrator.domain.workflow.routing import Workflow
from orchestrator.domain.workflow.violations import Violation
from orchestrator.engine.state.ledger import Ledger


async def expand_task(
    ledger: Ledger, task: str, spec: TaskSpec, phase: Phase, plan: Mapping[str, Any], attempt: int
) -> dict[str, TaskSpec] | Sequence[Violation]:
    """Return the tasks that a plan creates, by id, or the violations that prevent it.

    Settings that a plan can't define are inherited from the planning task: adapters, limits, checks. Ids of tasks from
    an earlier plan are not reused, even if a restore deleted them, because a checkpoint may restore them.
    """
    expansion = phase.expand or ExpansionSettings()
    known = await ledger.definitions.earlier_specs(task)
    own = f"{ledger.run.id}/{task}/"
    expand = partial(expand_plan, plan, limit=expansion.max, owns=spec.owns, taken={*ledger.run.tasks, *known})
    has_earlier = any(str(value.get("plan") or "").startswith(own) for value in known.values())
    planned = () if has_earlier else expand(f"{task}-")
    if has_earlier or await ledger.definitions.have_any_existed(
        [new.id for new in planned if isinstance(new, ExpandedTask)]
    ):
        planned = expand(f"{task}.{attempt}-")
    specs = {}
    for new in planned:
        if isinstance(new, Violation):
            return [violation for violation in planned if isinstance(violation, Violation)]
        changes = {
            "id": new.id,
            "prompt": new.prompt,
            "needs": new.needs,
            "built_needs": (),
            "owns": new.owns,
            "workflow": expansion.workflow,
            "context": spec.context if expansion.workflow is not None else {},
            "tracker": None,
            "plan": handoff_id(ledger.run.id, task, attempt),
        }
        specs[new.id] = spec.model_copy(update=changes)
    return specs


def expansion_changes(ledger: Ledger, task: str, specs: Mapping[str, TaskSpec]) -> dict[str, Any]:
    """Return the changes to a planning task; empty if its plan creates no tasks."""
    return {"subtasks": (*landed_subtasks(ledger, ledger.task(task)), *specs)} if specs else {}


def expansion_event(phase: Phase, specs: Mapping[str, TaskSpec]) -> TaskExpanded:
    """Return the event that records the tasks that the plan of a phase created."""
    return TaskExpanded(phase=phase.name, count=len(specs), tasks=list(specs))


def landed_subtasks(ledger: Ledger, document: TaskDocument) -> tuple[str, ...]:
    """Return the successful subtasks of a task."""
    return tuple(subtask for subtask in document.subtasks if ledger.task(subtask).status in SUCCESS_STATUSES)


def superseded_subtasks(
    ledger: Ledger, workflow: Workflow, document: TaskDocument, phase: str | None
) -> tuple[str, ...]:
    """Return the subtasks to drop when a task restarts from a phase.

    These are all subtasks that have not landed, if the phase that planned them runs again.
    """
    if phase is None or not document.subtasks:
        return ()
    repeated = {phase.name for phase in workflow.phases[workflow.index(phase) :] if phase.expand is not None}
    if not any(visit.phase in repeated for visit in document.phases):
        return ()
    landed = landed_subtasks(ledger, document)
    return tuple(subtask for subtask in document.subtasks if subtask not in landed)
