"""Plan a run without starting or recording anything. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from orchestrator.config.model import RunConfig
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.scheduling.admission import SessionFit
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.scheduling.plan import count_concurrent_sessions, plan_waves
from orchestrator.domain.settings.run_settings import TaskSpec
from orchestrator.domain.workflow.routing import DEFAULT_PHASES, Workflow, current_adapters
from orchestrator.engine.diagnostics.findings import Finding
from orchestrator.protocols import JsonObject


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """The plan of one task; durations are in seconds."""

    id: str
    needs: Sequence[str]
    waits_for: str | None
    """A task of the same wave with overlapping paths that would start first."""
    adapter: str
    """The adapter that would start it: the one of its first phase, if specified."""
    phases: Sequence[str]
    """The phases of its workflow, in order; empty without a workflow."""
    program: str
    """The program that the adapter would run."""
    starts_from: str
    """The branch that its worktree would start from."""
    checks: Sequence[str]
    attempts: int
    timeout: float
    idle_timeout: float | None
    priority: int


@dataclass(frozen=True, slots=True)
class PlannedWave:
    """Tasks whose needs are all in earlier waves, in starting order."""

    sessions: int
    """How many of them would run concurrently."""
    tasks: Sequence[PlannedTask]
    is_exact: bool
    """False if too many tasks own paths to compute `waits_for`."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """The plan of a run."""

    repository: str
    base: str
    target: str
    sandbox: str
    sessions: int
    """The largest number of concurrent sessions."""
    limited_by: str | None
    """The reason if the machine allows fewer sessions than the file's `capacity`."""
    waves: Sequence[PlannedWave]
    findings: Sequence[Finding] = ()
    """The problems and warnings of `council doctor`."""

    def to_json(self) -> JsonObject:
        """Return the result object of `council run --dry-run`."""
        return {"status": "planned", **asdict(self)}


def starting_adapters(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Return each task's first adapters by preference, if no phase is skipped."""
    document = TaskDocument()
    return {
        task.id: current_adapters(
            Workflow(config.phases_of(task.workflow) or DEFAULT_PHASES), document, task.adapter, task.fallback
        )
        for task in config.tasks
    }


def build_dry_run(
    config: RunConfig,
    starting: Mapping[str, tuple[str, ...]],
    programs: Mapping[str, str],
    fit: SessionFit,
    *,
    target: str,
    repository: str,
    sandbox: str,
) -> DryRun:
    """Plan a run of `config`.

    `starting` are the adapters that would start its tasks, `programs` the programs that they would run, `fit` is the
    capacity of the machine.
    """
    specs = {task.id: task for task in config.tasks}
    entries = {
        task.id: DispatchEntry(task.needs, starting[task.id][0], task.priority, task.owns, starting[task.id][1:])
        for task in config.tasks
    }
    limits = {name: adapter.capacity for name, adapter in config.adapters.items() if adapter.capacity is not None}

    def plan_task(spec: TaskSpec, waits_for: str | None) -> PlannedTask:
        return PlannedTask(
            id=spec.id,
            needs=spec.needs,
            waits_for=waits_for,
            adapter=starting[spec.id][0],
            phases=[phase.name for phase in config.phases_of(spec.workflow)],
            program=programs[spec.id],
            starts_from=target if spec.builds_on_target else config.base,
            checks=spec.check_commands,
            attempts=spec.attempts,
            timeout=spec.timeout,
            idle_timeout=spec.idle_timeout,
            priority=spec.priority,
        )

    waves = [
        PlannedWave(
            count_concurrent_sessions(wave, entries, limits, fit.sessions),
            [plan_task(specs[task], wave.waits_for.get(task)) for task in wave.tasks],
            wave.is_exact,
        )
        for wave in plan_waves(entries)
    ]
    most = max(wave.sessions for wave in waves)
    return DryRun(repository, config.base, target, sandbox, most, fit.limited_by, waves)
