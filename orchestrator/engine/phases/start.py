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
from orchestrator.domain.runs.phases import GivenValues, PhaseRecord
from orchestrator.domain.workflow.handoffs import Handoff, acknowledge
from orchestrator.domain.workflow.phase_context import get_phase_needs, select_values
from orchestrator.domain.workflow.routing import (
    Phase,
    Workflow,
    current_phase,
    enter_phase,
    find_continued_attempt,
    find_earlier_work,
    find_next_phase,
    has_open_visit,
)
from orchestrator.engine.phases.prompts import (
    HandoffInstructions,
    PromptFacts,
    describe_prompt_source,
    is_condition_met,
    render,
    render_task_prompt,
)
from orchestrator.engine.phases.values import PhaseInputs
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.protocols import JsonObject
from orchestrator.system.clock import Clock

#: What a phase is told that has no template.
_DEFAULT_TEMPLATE: Final = "{{ task.prompt }}"


@dataclass(frozen=True, slots=True)
class SessionPrompt:
    """What a session is told beside its notes."""

    text: str
    told: str | None = None
    """What stands behind that, where it begins a conversation."""
    follow_up: str | None = None
    """What it is told instead, where it goes on with one."""
    given: GivenValues = field(default_factory=GivenValues)
    received: Mapping[str, tuple[int, Handoff]] = field(default_factory=dict)
    """The handoffs that it is given, by id, with the versions of their documents."""


@dataclass(frozen=True, slots=True)
class NextPhase:
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
    brief: SessionPrompt | None = None
    is_restart: bool = False
    """Whether it begins anew, because the work that it was to mend does not fit any more."""
    is_newest: bool = True
    """Whether it begins at the newest state of what it builds on."""


@dataclass(frozen=True, slots=True)
class NoPhaseLeft:
    """No session is left for a task; `commit` is what it has built, None: nothing."""

    phases: tuple[PhaseRecord, ...]
    commit: str | None = None
    built: int | None = None


@dataclass(frozen=True, slots=True)
class PhaseStarter:
    """Says at which phase each task of a run is to have a session, and what that is told."""

    ledger: Ledger
    inputs: PhaseInputs
    clock: Clock
    has_tools: bool
    """Whether sessions can hand over by a command, or a tool."""

    async def turn(self, task: str, spec: TaskSpec) -> NextPhase | NoPhaseLeft:
        """Return what a task is to have a session for now; phases whose condition does not hold are skipped."""
        workflow, document = self.ledger.workflow(spec.workflow), self.ledger.task(task)
        if workflow.is_default:
            earlier = find_continued_attempt(workflow, document, workflow.phases[0])
            return NextPhase(workflow, workflow.phases[0], (), document.start, document.base, earlier)
        phases, phase = document.phases, current_phase(workflow, document)
        if phase is not None and not has_open_visit(document):
            values = await self.inputs.values(task, spec, workflow, phase)
            condition = partial(is_condition_met, values=values.known)
            phases, phase = find_next_phase(workflow, phases, workflow.index(phase.name), condition, self.clock.now())
        work = find_earlier_work(workflow, document)
        if phase is None:
            return NoPhaseLeft(phases, None if work is None else work.commit, None if work is None else work.attempt)
        start = NextPhase(workflow, phase, phases, earlier=find_continued_attempt(workflow, document, phase))
        if document.start is not None:
            return replace(start, start=document.start, base=document.base)
        return start if work is None else replace(start, start=work.commit, base=work.base)

    async def brief(self, task: str, spec: TaskSpec, turn: NextPhase, diff: str | None = None) -> SessionPrompt:
        """Return what the session of a turn is told and given; `diff` is of the work that it starts with."""
        document = self.ledger.task(task)
        if turn.workflow.is_default:
            feedback = None if turn.is_restart else document.feedback
            return SessionPrompt(render_plain_prompt(spec), told=feedback, follow_up=feedback)
        phase = turn.phase
        values = await self.inputs.values(task, spec, turn.workflow, phase)
        kind = None if phase.produces is None else self.inputs.kind(phase)
        given, measured = select_values(values.known, values.wanted(phase, get_phase_needs(phase, kind)))
        visits = [one for one in document.phases if one.phase == phase.name]
        facts = PromptFacts(
            task=task,
            prompt=spec.prompt,
            mark=secrets.token_hex(8),
            phase=phase.name,
            name=phase.name,
            tracker=spec.tracker,
            planner=planning_task(spec),
            round=max(len(visits) + (not has_open_visit(document)), 1),
            writes=phase.writes,
            given=given,
            results=values.results,
            feedback=None if turn.is_restart else document.feedback,
            base=turn.base,
            diff=diff,
            owns=spec.owns,
            handoff=self._handoff_instructions(phase),
        )
        prompt = render(phase.prompt or _DEFAULT_TEMPLATE, facts)
        follow_up = prompt.follow_up or prompt.text
        return SessionPrompt(prompt.text, follow_up=follow_up, given=measured, received=values.received(given))

    def build_start_update(
        self, task: str, turn: NextPhase, attempt: Attempt, attempts: Sequence[Attempt]
    ) -> TaskUpdate:
        """Return what is recorded where an attempt begins at a turn."""
        document, brief, now = self.ledger.task(task), turn.brief, self.clock.now()
        details: JsonObject = {"base": attempt.base, "adapter": attempt.adapter}
        changes: dict[str, Any] = {"attempts": tuple(attempts), "current": None}
        if turn.workflow.is_default or brief is None:
            return TaskUpdate(details, changes)
        before = document.model_copy(update={"phases": turn.phases})
        is_new = not has_open_visit(before)
        given: dict[str, Any] = {"given": brief.given, "received": tuple(brief.received)} if is_new else {}
        changes |= enter_phase(turn.workflow, before, turn.phase, attempt.number, now, **given)
        details["phase"] = turn.phase.name
        if not is_new:
            return TaskUpdate(details, changes)
        taken = {
            id_: (version, acknowledge(handoff, turn.phase.name, attempt.number, now))
            for id_, (version, handoff) in brief.received.items()
        }
        events = [
            ("handoff.received", {"task": task, "handoff": id_, "phase": turn.phase.name, "digest": one.digest})
            for id_, (_, one) in taken.items()
        ]
        writes = [self.ledger.handoff_write(one, version) for version, one in taken.values()]
        return TaskUpdate(details, changes, writes, events)

    def build_finish_update(self, rest: NoPhaseLeft) -> tuple[TaskUpdate, Trigger]:
        """Return what is recorded, and by which trigger, where no session is left for a task."""
        changes: dict[str, Any] = {"phases": rest.phases, "phase": None, "reason": None}
        if rest.commit is None:
            return TaskUpdate({}, changes), Trigger.FINISH
        return TaskUpdate({}, {**changes, "commit": rest.commit, "built": rest.built}), Trigger.QUEUE

    def _handoff_instructions(self, phase: Phase) -> HandoffInstructions | None:
        if phase.produces is None:
            return None
        schema = self.inputs.kind(phase).schema
        return HandoffInstructions(phase.produces, schema, writes=phase.writes, has_tools=self.has_tools)


def render_plain_prompt(spec: TaskSpec) -> str:
    """Return what a task without a workflow is asked to do; what a tracker or a plan says is marked off."""
    source = describe_prompt_source(spec.tracker, planning_task(spec))
    return spec.prompt if source is None else f"{render_task_prompt(spec.prompt, source, secrets.token_hex(8))}\n"


def planning_task(spec: TaskSpec) -> str | None:
    """Return the task whose plan a task came of; None where it came of none."""
    return None if spec.plan is None else spec.plan.split("/")[1]
