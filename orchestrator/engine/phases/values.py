"""What a phase could be given: what its task began with, and what the phases before it handed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from orchestrator.config.model import TaskSpec
from orchestrator.domain.documents.json_values import is_empty_value
from orchestrator.domain.runs.phases import PhaseRecord
from orchestrator.domain.workflow.handoff_kinds import HandoffKind, kind_from_schema
from orchestrator.domain.workflow.handoffs import Handoff, get_payload, is_intact
from orchestrator.domain.workflow.phase_context import PhaseContext, build_phase_context
from orchestrator.domain.workflow.routing import Phase, Workflow, completed_visits
from orchestrator.domain.workflow.violations import HandoffFacts
from orchestrator.engine.session_api.shared_values import SharedValues
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import HandoffCorrupted, RefusedError

#: The value that says what is to be done with what was mediated.
MEDIATION_INSTRUCTIONS: Final = "handoff_instructions"


@dataclass(frozen=True, slots=True)
class PhaseValues:
    """The values of a phase by name, and the handoffs that they come from."""

    context: PhaseContext
    produced: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What each earlier phase added."""
    handoffs: Mapping[str, tuple[int, Handoff]] = field(default_factory=dict)
    """What each of them handed over, by the phase, with the version of the document."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """The same as the phases were given it."""

    @property
    def known(self) -> dict[str, Any]:
        """All that it could be given."""
        return self.context.complete()

    def wanted(self, phase: Phase, needs: Sequence[str] | None) -> Sequence[str] | None:
        """Return the names of the values that a phase gets: what was mediated for it is all for it."""
        if needs is None:
            return None
        made = [
            name
            for source, (_, handoff) in self.handoffs.items()
            if handoff.mediation is not None and handoff.to == phase.name
            for name in self.produced[source]
        ]
        return tuple(dict.fromkeys((*needs, *made)))

    def received(self, given: Mapping[str, Any]) -> dict[str, tuple[int, Handoff]]:
        """Return the handoffs that given values come from, by id, with the versions of their documents."""
        return {
            found[1].id: found
            for phase, found in self.handoffs.items()
            if not self.produced[phase] or any(name in given for name in self.produced[phase])
        }

    def with_produced(self, added: Mapping[str, Any], phase: str, result: Mapping[str, Any]) -> PhaseValues:
        """Return the values once the phase itself has added some, for what follows."""
        context = replace(self.context, produced=added)
        return replace(self, context=context, results={**self.results, phase: result})


@dataclass(frozen=True, slots=True)
class PhaseInputs:
    """Finds what the phases of one run's tasks could be given."""

    ledger: Ledger
    kinds: Mapping[str, HandoffKind]
    """What can be handed over, by name, beside what a workflow's own schemas say."""
    shared_values: SharedValues

    async def values(self, task: str, spec: TaskSpec, workflow: Workflow, phase: Phase) -> PhaseValues:
        """Return what a phase could be given, or its condition be about."""
        document = self.ledger.task(task)
        handoffs = await self.ledger.handoffs(task)
        done = completed_visits(workflow, document)
        return await collect_phase_values(workflow, phase, spec.context, done, handoffs, self.kind, self.shared_values)

    def kind(self, phase: Phase) -> HandoffKind:
        """Return the kind of what a phase hands over; RefusedError where nothing brings it any more."""
        name = phase.produces or phase.name
        if phase.schema_ is not None:
            return kind_from_schema(name, phase.schema_)
        if name not in self.kinds:
            what = f"phase {phase.name!r} produces a {name!r}, which no installed plugin brings"
            raise RefusedError(what, "install the plugin that does, then `council retry` the task")
        return self.kinds[name]


async def collect_phase_values(
    workflow: Workflow,
    phase: Phase,
    inherited: Mapping[str, Any],
    done: Mapping[str, PhaseRecord],
    handoffs: Mapping[str, tuple[int, Handoff]],
    kind_of: Callable[[Phase], HandoffKind],
    sharing: SharedValues,
) -> PhaseValues:
    """Return the values of a phase; `done` are the visits before it that count, `handoffs` all of the task by id."""
    produced: dict[str, Mapping[str, Any]] = {}
    known = set(inherited)
    results: dict[str, Any] = {}
    found: dict[str, tuple[int, Handoff]] = {}
    # Nobody changes behind a person's back what that person let pass.
    last = max((at for at, name in enumerate(done) if workflow.phase(name).approve), default=-1)
    approved = list(done)[: last + 1]
    for name, record in done.items():
        if record.handoff is None or record.handoff not in handoffs:
            continue
        source = workflow.phase(name)
        if source.mediator not in {None, phase.name} and source.mediator in done:
            continue  # what stands between has made of it what is to be known
        found[name] = handoffs[record.handoff]
        if not is_intact(found[name][1]):
            raise HandoffCorrupted(record.handoff, "its digest does not match what it holds")
        handoff = found[name][1]
        is_open = handoff.protocol == "shared" and name not in approved
        results[name] = (
            await _latest_shared_data(handoff, kind_of(source), sharing) if is_open else get_payload(handoff)
        )
        mediation = handoff.mediation
        if mediation is None:
            added = kind_of(source).exports(results[name])
        elif mediation.transformation is None:
            added = kind_of(source).exports(mediation.processed)
        else:
            added = dict(mediation.processed)
        if mediation is not None and handoff.to == phase.name:
            added[MEDIATION_INSTRUCTIONS] = mediation.instructions
        # What says nothing takes the place of nothing.
        produced[name] = {key: value for key, value in added.items() if key not in known or not is_empty_value(value)}
        known |= produced[name].keys()
    context = build_phase_context(phase, workflow.before(phase.name), inherited, produced)
    return PhaseValues(context, produced, found, results)


async def _latest_shared_data(handoff: Handoff, kind: HandoffKind, sharing: SharedValues) -> dict[str, Any]:
    """Return what others have made since of a handoff that is shared, if that fits its kind; else what it was."""
    if handoff.key is not None:
        now = await sharing.get(handoff.key)
        if now is not None and now.version != handoff.version and isinstance(now.value, dict):
            checked = kind.check(now.value, HandoffFacts())
            if checked.data is not None:
                return checked.data
    return get_payload(handoff)
