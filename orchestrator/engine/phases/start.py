"""What the session of a phase is told and given, and what is recorded where it begins."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from orchestrator.config.model import TaskSpec
from orchestrator.domain.runs.lifecycle import Trigger
from orchestrator.domain.runs.model import Attempt
from orchestrator.domain.runs.phases import Given, PhaseRecord
from orchestrator.domain.workflow.handoffs import Handoff, acknowledged
from orchestrator.domain.workflow.phase_context import filtered, needs_of
from orchestrator.domain.workflow.routing import (
    Phase,
    Workflow,
    current,
    entered,
    goes_on_with,
    is_open,
    onward,
    work_before,
)
from orchestrator.engine.phases.prompts import HandingOver, PromptFacts, asked, holds, render, source_of
from orchestrator.engine.phases.values import PhaseInputs
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.transitions import Update
from orchestrator.protocols import JsonObject
from orchestrator.system.clock import Clock

#: What a phase is told that has no template.
_AS_IT_IS: Final = "{{ task.prompt }}"


@dataclass(frozen=True, slots=True)
class Brief:
    """What a session is told beside its notes."""

    text: str
    told: str | None = None
    """What stands behind that, where it begins a conversation."""
    follow_up: str | None = None
    """What it is told instead, where it goes on with one."""
    given: Given = field(default_factory=Given)
    received: Mapping[str, tuple[int, Handoff]] = field(default_factory=dict)
    """The handoffs that it is given, by id, with the versions of their documents."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The phase that a task is to have a session for now; `phases` are its visits so far, those skipped with them."""

    workflow: Workflow
    phase: Phase
    phases: tuple[PhaseRecord, ...] = ()
    start: str | None = None
    """The commit that it begins at, where that is not the base."""
    base: str | None = None
    """The commit that its work is judged against, where it begins elsewhere."""
    earlier: int | None = None
    """The attempt whose conversation it is to go on with."""
    brief: Brief | None = None
    is_anew: bool = False
    """Whether it begins anew, because the work that it was to mend does not fit any more."""
    is_newest: bool = True
    """Whether it begins at the newest state of what it builds on."""


@dataclass(frozen=True, slots=True)
class Rest:
    """No session is left for a task; `commit` is what it has built, None: nothing."""

    phases: tuple[PhaseRecord, ...]
    commit: str | None = None
    built: int | None = None


@dataclass(frozen=True, slots=True)
class Briefing:
    """Says at which phase each task of a run is to have a session, and what that is told."""

    ledger: Ledger
    inputs: PhaseInputs
    clock: Clock
    has_tools: bool
    """Whether sessions can hand over by a command, or a tool."""

    async def turn(self, task: str, spec: TaskSpec) -> Turn | Rest:
        """Return what a task is to have a session for now; phases whose condition does not hold are skipped."""
        workflow, document = self.ledger.workflow(spec.workflow), self.ledger.task(task)
        if workflow.is_plain:
            earlier = goes_on_with(workflow, document, workflow.phases[0])
            return Turn(workflow, workflow.phases[0], (), document.start, document.base, earlier)
        phases, phase = document.phases, current(workflow, document)
        if phase is not None and not is_open(document):
            values = await self.inputs.values(task, spec, workflow, phase)
            condition = partial(holds, values=values.known)
            phases, phase = onward(workflow, phases, workflow.index(phase.name), condition, self.clock.now())
        work = work_before(workflow, document)
        if phase is None:
            return Rest(phases, None if work is None else work.commit, None if work is None else work.attempt)
        start = Turn(workflow, phase, phases, earlier=goes_on_with(workflow, document, phase))
        if document.start is not None:
            return replace(start, start=document.start, base=document.base)
        return start if work is None else replace(start, start=work.commit, base=work.base)

    async def brief(self, task: str, spec: TaskSpec, turn: Turn, diff: str | None = None) -> Brief:
        """Return what the session of a turn is told and given; `diff` is of the work that it starts with."""
        document = self.ledger.task(task)
        if turn.workflow.is_plain:
            feedback = None if turn.is_anew else document.feedback
            return Brief(told_task(spec), told=feedback, follow_up=feedback)
        phase = turn.phase
        values = await self.inputs.values(task, spec, turn.workflow, phase)
        kind = None if phase.produces is None else self.inputs.kind(phase)
        given, measured = filtered(values.known, values.wanted(phase, needs_of(phase, kind)))
        visits = [one for one in document.phases if one.phase == phase.name]
        facts = PromptFacts(
            task=task,
            prompt=spec.prompt,
            mark=secrets.token_hex(8),
            phase=phase.name,
            name=phase.name,
            tracker=spec.tracker,
            planner=planner_of(spec),
            round=max(len(visits) + (not is_open(document)), 1),
            writes=phase.writes,
            given=given,
            results=values.results,
            feedback=None if turn.is_anew else document.feedback,
            base=turn.base,
            diff=diff,
            owns=spec.owns,
            handing=self._handing(phase),
        )
        prompt = render(phase.prompt or _AS_IT_IS, facts)
        follow_up = prompt.follow_up or prompt.text
        return Brief(prompt.text, follow_up=follow_up, given=measured, received=values.received(given))

    def entering(self, task: str, turn: Turn, attempt: Attempt, attempts: Sequence[Attempt]) -> Update:
        """Return what is recorded where an attempt begins at a turn."""
        document, brief, now = self.ledger.task(task), turn.brief, self.clock.now()
        details: JsonObject = {"base": attempt.base, "adapter": attempt.adapter}
        changes: dict[str, Any] = {"attempts": tuple(attempts), "current": None}
        if turn.workflow.is_plain or brief is None:
            return Update(details, changes)
        before = document.model_copy(update={"phases": turn.phases})
        is_new = not is_open(before)
        given: dict[str, Any] = {"given": brief.given, "received": tuple(brief.received)} if is_new else {}
        changes |= entered(turn.workflow, before, turn.phase, attempt.number, now, **given)
        details["phase"] = turn.phase.name
        if not is_new:
            return Update(details, changes)
        taken = {
            id_: (version, acknowledged(handoff, turn.phase.name, attempt.number, now))
            for id_, (version, handoff) in brief.received.items()
        }
        events = [
            ("handoff.received", {"task": task, "handoff": id_, "phase": turn.phase.name, "digest": one.digest})
            for id_, (_, one) in taken.items()
        ]
        writes = [self.ledger.handed_over(one, version) for version, one in taken.values()]
        return Update(details, changes, writes, events)

    def resting(self, rest: Rest) -> tuple[Update, Trigger]:
        """Return what is recorded, and by which trigger, where no session is left for a task."""
        changes: dict[str, Any] = {"phases": rest.phases, "phase": None, "reason": None}
        if rest.commit is None:
            return Update({}, changes), Trigger.FINISH
        return Update({}, {**changes, "commit": rest.commit, "built": rest.built}), Trigger.QUEUE

    def _handing(self, phase: Phase) -> HandingOver | None:
        if phase.produces is None:
            return None
        schema = self.inputs.kind(phase).schema
        return HandingOver(phase.produces, schema, writes=phase.writes, has_tools=self.has_tools)


def told_task(spec: TaskSpec) -> str:
    """Return what a task without a workflow is asked to do; what a tracker or a plan says is marked off."""
    source = source_of(spec.tracker, planner_of(spec))
    return spec.prompt if source is None else f"{asked(spec.prompt, source, secrets.token_hex(8))}\n"


def planner_of(spec: TaskSpec) -> str | None:
    """Return the task whose plan a task came of; None where it came of none."""
    return None if spec.plan is None else spec.plan.split("/")[1]
