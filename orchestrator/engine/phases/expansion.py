"""The tasks that the plan of a phase becomes: what each is told and may, and what records them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from orchestrator.config.model import TaskSpec
from orchestrator.domain.runs.model import SUCCESS_STATUSES, TaskDocument
from orchestrator.domain.workflow.expansion import ExpandedTask, expand_plan
from orchestrator.domain.workflow.handoffs import handoff_id
from orchestrator.domain.workflow.routing import Expansion, Phase, Workflow
from orchestrator.domain.workflow.violations import Violation
from orchestrator.engine.state.ledger import Ledger
from orchestrator.protocols import JsonObject


async def expand_task(
    ledger: Ledger, task: str, spec: TaskSpec, phase: Phase, plan: Mapping[str, Any], attempt: int
) -> dict[str, TaskSpec] | Sequence[Violation]:
    """Return the tasks that a plan becomes which an attempt handed over, by their names; or what keeps it from that.

    All that the plan does not say is as its task has it: who works on them, for how long, with what and under which
    checks. What an earlier plan of the task became keeps its names, also where a restore has deleted it: a checkpoint
    may bring it back.
    """
    expansion = phase.expand or Expansion()
    known = await ledger.earlier_specs(task)
    own = f"{ledger.run.id}/{task}/"
    named = partial(expand_plan, plan, most=expansion.most, owns=spec.owns, taken={*ledger.run.tasks, *known})
    has_earlier = any(str(value.get("plan") or "").startswith(own) for value in known.values())
    found = () if has_earlier else named(f"{task}-")
    if has_earlier or await ledger.have_any_existed([one.id for one in found if isinstance(one, ExpandedTask)]):
        found = named(f"{task}.{attempt}-")
    specs = {}
    for one in found:
        if isinstance(one, Violation):
            return [each for each in found if isinstance(each, Violation)]
        changes = {
            "id": one.id,
            "prompt": one.prompt,
            "needs": one.needs,
            "owns": one.owns,
            "workflow": expansion.workflow,
            "context": spec.context if expansion.workflow is not None else {},
            "tracker": None,
            "plan": handoff_id(ledger.run.id, task, attempt),
        }
        specs[one.id] = spec.model_copy(update=changes)
    return specs


def expansion_changes(ledger: Ledger, task: str, specs: Mapping[str, TaskSpec]) -> dict[str, Any]:
    """Return the changes to a task whose plan becomes these tasks; nothing changes without any."""
    return {"expanded": (*landed_parts(ledger, ledger.task(task)), *specs)} if specs else {}


def describe_expansion(phase: Phase, specs: Mapping[str, TaskSpec]) -> JsonObject:
    """Return what an event says of the tasks that the plan of a phase became."""
    return {"phase": phase.name, "count": len(specs), "tasks": list(specs)}


def landed_parts(ledger: Ledger, document: TaskDocument) -> tuple[str, ...]:
    """Return of what the plans of a task became that of which nothing is left to do."""
    return tuple(one for one in document.expanded if ledger.task(one).status in SUCCESS_STATUSES)


def superseded_parts(ledger: Ledger, workflow: Workflow, document: TaskDocument, phase: str | None) -> tuple[str, ...]:
    """Return what of an earlier plan is to be given up where a task is tried again from a phase on: a new one follows.

    That is whatever has not landed, where the phase that planned it is to be done again.
    """
    if phase is None or not document.expanded:
        return ()
    again = {one.name for one in workflow.phases[workflow.index(phase) :] if one.expand is not None}
    if not any(one.phase in again for one in document.phases):
        return ()
    landed = landed_parts(ledger, document)
    return tuple(one for one in document.expanded if one not in landed)
