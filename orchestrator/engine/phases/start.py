"""Choose a task's next phase, build its prompt, and record its start."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from orchestrator.domain.events.phases import HandoffReceived
from orchestrator.domain.events.tasks import TaskDone, TaskQueued, TaskStarted, salvage_name
from orchestrator.domain.runs.model import Attempt
from orchestrator.domain.runs.phases import InputSummary, PhaseRecord
from orchestrator.domain.runs.statuses import Trigger
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.wording import join_names
from orchestrator.domain.workflow.handoffs import Handoff, acknowledge
from orchestrator.domain.workflow.phase_context import get_phase_needs, select_values
from orchestrator.domain.workflow.routing import (
    Workflow,
    current_phase,
    enter_phase,
    find_continued_attempt,
    find_earlier_work,
    find_next_phase,
    has_open_visit,
)
from orchestrator.engine.phases.prompts import (
    PromptVariables,
    describe_prompt_source,
    is_condition_met,
    render,
    render_handoff_instructions,
    render_restart,
    render_task_prompt,
)
from orchestrator.engine.phases.values import PhaseInputs
from orchestrator.engine.state.ledger import Ledger
from orchestrator.engine.state.tasks import handoff_write
from orchestrator.engine.state.transitions import TaskUpdate
from orchestrator.system.clock import Clock

#: The maximum number of conflicting paths in the reason for a restart.
_MAX_NAMED_PATHS: Final = 10
#: The template of a phase without its own.
_DEFAULT_TEMPLATE: Final = "{{ task.prompt }}"


@dataclass(frozen=True, slots=True)
class ConflictingWork:
    """Work that a session was meant to fix, but that conflicts with the target."""

    branch: str | None
    commit: str
    base: str | None
    """The commit that the work is compared with; None if it may be missing here."""
    paths: tuple[str, ...] = ()
    """The conflicting paths, if known."""

    def describe(self) -> str:
        """Return the reason why a session starts from scratch."""
        work = "the earlier work" if self.branch is None else f"the earlier work ({salvage_name(self.branch)})"
        paths = f" in {join_names(self.paths, _MAX_NAMED_PATHS)}" if self.paths else ""
        return f"{work} conflicts with the target{paths}: starting from scratch"


@dataclass(frozen=True, slots=True)
class NextPhase:
    """The phase of a task's next session, and the session's prompt once it is built.

    `phases` are the task's visits so far, including skipped ones.
    """

    workflow: Workflow
    phase: Phase
    phases: tuple[PhaseRecord, ...] = ()
    start: str | None = None
    """The commit that it starts from, if not the base."""
    base: str | None = None
    """The commit that its work is compared with, if not the start."""
    earlier: int | None = None
    """The attempt whose conversation it continues."""
    new_conversation: str = ""
    """Why it can't continue that conversation, if its adapter could."""
    conflicting: ConflictingWork | None = None
    """The earlier work, if it conflicts and the session starts from scratch instead of fixing it."""
    is_newest: bool = True
    """Whether it starts from the newest state of its base."""
    stacked_on: Mapping[str, str] = field(default_factory=dict)
    """The tasks whose unlanded work is part of its base, each with the commit of that work."""
    prompt: str = ""
    """The prompt of the session, without its notes."""
    suffix: str | None = None
    """Text to append if the session starts a conversation."""
    follow_up: str | None = None
    """The text that replaces the prompt if the session continues a conversation; None: nothing new."""
    inputs: InputSummary = field(default_factory=InputSummary)
    received: Mapping[str, tuple[int, Handoff]] = field(default_factory=dict)
    """The handoffs passed to the session, by id, with their document versions."""


@dataclass(frozen=True, slots=True)
class PhaseStarter:
    """Chooses the next phase of each task of a run, and builds its prompt."""

    ledger: Ledger
    inputs: PhaseInputs
    clock: Clock
    has_tools: bool
    """Whether sessions have the handoff command and tool."""

    async def next_phase(self, task: str, spec: TaskSpec) -> NextPhase | TaskUpdate:
        """Return the phase of a task's next session, skipping unmet conditions.

        If no phase remains, return the update that queues its work to land, or marks the task done.
        """
        workflow, document = self.ledger.definitions.workflow(spec.workflow), self.ledger.task(task)
        if document.commit is not None:  # it was built on the work of a task that ended, and has been built since
            return TaskUpdate(Trigger.QUEUE, TaskQueued(), {"reason": None})
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
            changes: dict[str, Any] = {"phases": phases, "phase": None, "reason": None}
            if work is None:
                return TaskUpdate(Trigger.FINISH, TaskDone(), changes)
            return TaskUpdate(Trigger.QUEUE, TaskQueued(), {**changes, "commit": work.commit, "built_by": work.attempt})
        start = NextPhase(workflow, phase, phases, earlier=find_continued_attempt(workflow, document, phase))
        if document.start is not None:
            return replace(start, start=document.start, base=document.base)
        return start if work is None else replace(start, start=work.commit, base=work.base)

    async def build_prompt(self, task: str, spec: TaskSpec, following: NextPhase, diff: str | None = None) -> NextPhase:
        """Return a phase with the prompt and inputs of its session.

        `diff` shows the work that the session starts from, or that conflicts with the target.
        """
        document = self.ledger.task(task)
        feedback = document.feedback
        if following.conflicting is not None:
            feedback = render_restart(following.conflicting.paths, diff, feedback, secrets.token_hex(8))
            diff = None
        if following.workflow.is_default:
            return replace(following, prompt=render_plain_prompt(spec), suffix=feedback, follow_up=feedback)
        phase = following.phase
        values = await self.inputs.values(task, spec, following.workflow, phase)
        kind = submit_handoff = None
        if phase.kind is not None:
            kind = self.inputs.kind(phase)
            submit_handoff = render_handoff_instructions(
                phase.kind, kind.schema, writes=phase.writes, has_tools=self.has_tools
            )
        inputs, measured = select_values(values.known, values.wanted(phase, get_phase_needs(phase, kind)))
        visits = [visit for visit in document.phases if visit.phase == phase.name]
        variables = PromptVariables(
            task=task,
            prompt=spec.prompt,
            marker=secrets.token_hex(8),
            phase=phase.name,
            tracker=spec.tracker,
            planner=planning_task(spec),
            round=max(len(visits) + (not has_open_visit(document)), 1),
            writes=phase.writes,
            inputs=inputs,
            results=values.results,
            feedback=feedback,
            base=following.base,
            diff=diff,
            owns=spec.owns,
            submit_handoff=submit_handoff,
        )
        prompt, follow_up = render(phase.prompt or _DEFAULT_TEMPLATE, variables)
        received = values.received(inputs)
        return replace(following, prompt=prompt, follow_up=follow_up or prompt, inputs=measured, received=received)

    def build_start_update(
        self, task: str, following: NextPhase, attempt: Attempt, attempts: Sequence[Attempt]
    ) -> TaskUpdate:
        """Return the update that records the start of an attempt at a phase."""
        document, now = self.ledger.task(task), self.clock.now()
        event = TaskStarted(base=attempt.base, adapter=attempt.adapter)
        attached = "a user is attached" if attempt.attached else ""
        if reasons := [*filter(None, (attempt.restart_reason, following.new_conversation, attached))]:
            event = event.replace(reason="; ".join(reasons))
        changes: dict[str, Any] = {"attempts": tuple(attempts), "current": None}
        if following.workflow.is_default:
            return TaskUpdate(Trigger.START, event, changes)
        before = document.model_copy(update={"phases": following.phases})
        phase = following.phase.name
        is_new = not has_open_visit(before)
        recorded: dict[str, Any] = {"inputs": following.inputs, "received": tuple(following.received)} if is_new else {}
        changes |= enter_phase(following.workflow, before, following.phase, attempt.number, now, **recorded)
        event = event.replace(phase=phase)
        if not is_new:
            return TaskUpdate(Trigger.START, event, changes)
        received = {
            id_: (version, acknowledge(handoff, phase, attempt.number, now))
            for id_, (version, handoff) in following.received.items()
        }
        events = [
            HandoffReceived(task=task, handoff=id_, phase=phase, digest=handoff.digest)
            for id_, (_, handoff) in received.items()
        ]
        writes = [handoff_write(handoff, version) for version, handoff in received.values()]
        return TaskUpdate(Trigger.START, event, changes, writes, events)


def render_plain_prompt(spec: TaskSpec) -> str:
    """Render the prompt of a task without workflow; text from others is quoted."""
    source = describe_prompt_source(spec.tracker, planning_task(spec))
    return spec.prompt if source is None else f"{render_task_prompt(spec.prompt, source, secrets.token_hex(8))}\n"


def planning_task(spec: TaskSpec) -> str | None:
    """Return the task whose plan created a task, or None."""
    return None if spec.plan is None else spec.plan.split("/")[1]
