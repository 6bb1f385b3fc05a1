"""Collect a phase's values: the task's context, and results of earlier phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from orchestrator.domain.documents.json_values import is_empty_value
from orchestrator.domain.runs.phases import PhaseRecord
from orchestrator.domain.settings.phase_settings import Phase
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.handoff_kinds import HandoffKind, kind_from_schema
from orchestrator.domain.workflow.handoffs import Handoff, get_payload, is_intact
from orchestrator.domain.workflow.routing import Workflow, completed_visits
from orchestrator.domain.workflow.violations import HandoffContext
from orchestrator.engine.session_api.shared_values import SharedValues
from orchestrator.engine.state.ledger import Ledger
from orchestrator.errors import HandoffCorrupted, RefusedError

#: The value with the instructions for mediated data.
MEDIATION_INSTRUCTIONS: Final = "handoff_instructions"


@dataclass(frozen=True, slots=True)
class PhaseValues:
    """The values of a phase by name, and the handoffs that they come from."""

    known: Mapping[str, Any]
    """All available values: those of the task, those that earlier phases added, and those of the phase itself."""
    produced: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The values that each earlier phase added."""
    handoffs: Mapping[str, tuple[int, Handoff]] = field(default_factory=dict)
    """The handoff of each earlier phase, with its document version."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """The result of each earlier phase, as later phases see it."""

    def wanted(self, phase: Phase, needs: Sequence[str] | None) -> Sequence[str] | None:
        """Return the names of a phase's values: its needs, and data mediated for it."""
        if needs is None:
            return None
        mediated = [
            name
            for source, (_, handoff) in self.handoffs.items()
            if handoff.mediation is not None and handoff.to == phase.name
            for name in self.produced[source]
        ]
        return tuple(dict.fromkeys((*needs, *mediated)))

    def received(self, inputs: Mapping[str, Any]) -> dict[str, tuple[int, Handoff]]:
        """Return the source handoffs of input values, by id, with document versions."""
        return {
            versioned[1].id: versioned
            for phase, versioned in self.handoffs.items()
            if not self.produced[phase] or any(name in inputs for name in self.produced[phase])
        }

    def with_produced(self, added: Mapping[str, Any], phase: str, result: Mapping[str, Any]) -> PhaseValues:
        """Return the values, plus those that the phase itself added for later phases."""
        return replace(self, known={**self.known, **added}, results={**self.results, phase: result})


@dataclass(frozen=True, slots=True)
class PhaseInputs:
    """Collects the values for the phases of one run's tasks."""

    ledger: Ledger
    kinds: Mapping[str, HandoffKind]
    """The handoff kinds by name, in addition to a workflow's own schemas."""
    shared_values: SharedValues

    async def values(self, task: str, spec: TaskSpec, workflow: Workflow, phase: Phase) -> PhaseValues:
        """Return the values that a phase and its condition can use."""
        document = self.ledger.task(task)
        handoffs = await self.ledger.definitions.handoffs(task)
        done = completed_visits(workflow, document)
        return await collect_phase_values(workflow, phase, spec.context, done, handoffs, self.kind, self.shared_values)

    def kind(self, phase: Phase) -> HandoffKind:
        """Return a phase's handoff kind; raise RefusedError if its plugin is missing."""
        name = phase.kind or phase.name
        if phase.handoff_schema is not None:
            return kind_from_schema(name, phase.handoff_schema)
        if name not in self.kinds:
            message = f"phase {phase.name!r} produces a {name!r}, which no installed plugin provides"
            raise RefusedError(message, "install the plugin, then `council retry` the task")
        return self.kinds[name]


async def collect_phase_values(
    workflow: Workflow,
    phase: Phase,
    inherited: Mapping[str, Any],
    done: Mapping[str, PhaseRecord],
    handoffs: Mapping[str, tuple[int, Handoff]],
    kind_of: Callable[[Phase], HandoffKind],
    shared_values: SharedValues,
) -> PhaseValues:
    """Return a phase's values from earlier visits and the task's handoffs by id."""
    produced: dict[str, Mapping[str, Any]] = {}
    known = dict(inherited)
    results: dict[str, Any] = {}
    by_phase: dict[str, tuple[int, Handoff]] = {}
    # Shared data must not change after a user has approved it.
    last = max((index for index, name in enumerate(done) if workflow.phase(name).approve), default=-1)
    approved = list(done)[: last + 1]
    for name, record in done.items():
        if record.handoff is None or record.handoff not in handoffs:
            continue
        source = workflow.phase(name)
        if source.mediator not in {None, phase.name} and source.mediator in done:
            continue  # the mediating phase's result replaces it
        by_phase[name] = handoffs[record.handoff]
        handoff = by_phase[name][1]
        if not is_intact(handoff):
            raise HandoffCorrupted(record.handoff, "its digest does not match its data")
        is_open = handoff.protocol == "shared" and name not in approved
        results[name] = (
            await _latest_shared_data(handoff, kind_of(source), shared_values) if is_open else get_payload(handoff)
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
        # An empty value does not replace a known one.
        produced[name] = {key: value for key, value in added.items() if key not in known or not is_empty_value(value)}
        known |= produced[name]
    return PhaseValues({**known, **phase.context}, produced, by_phase, results)


async def _latest_shared_data(handoff: Handoff, kind: HandoffKind, shared_values: SharedValues) -> dict[str, Any]:
    """Return the data of a shared handoff if valid for its kind, else the original."""
    if handoff.key is not None:
        current = await shared_values.get(handoff.key)
        if current is not None and current.version != handoff.version and isinstance(current.value, dict):
            checked = kind.check(current.value, HandoffContext())
            if checked.data is not None:
                return checked.data
    return get_payload(handoff)
