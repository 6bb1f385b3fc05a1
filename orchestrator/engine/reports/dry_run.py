"""What a run would do, told without starting or recording anything. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from orchestrator.config.model import RunConfig, TaskSpec
from orchestrator.domain.runs.model import TaskDocument
from orchestrator.domain.scheduling.admission import SessionFit
from orchestrator.domain.scheduling.dispatch import DispatchEntry
from orchestrator.domain.scheduling.plan import count_concurrent_sessions, plan_waves
from orchestrator.domain.workflow.routing import DEFAULT_PHASES, Workflow, current_adapters
from orchestrator.engine.diagnostics.findings import Finding
from orchestrator.protocols import JsonObject


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One task as it would run; durations are in seconds."""

    id: str
    needs: Sequence[str]
    follows: str | None
    """A task of the same wave that owns a common path and would start first."""
    adapter: str
    """The one that would start it: its first phase's, where that names one."""
    phases: Sequence[str]
    """Those of its workflow, in their order; none where it has no workflow."""
    program: str
    """The first word of what that adapter would run."""
    starts_from: str
    """The branch that its worktree would begin at."""
    checks: Sequence[str]
    attempts: int
    timeout: float
    idle_timeout: float | None
    priority: int


@dataclass(frozen=True, slots=True)
class PlannedWave:
    """Tasks whose needs are all in earlier waves, in the order in which they would start."""

    sessions: int
    """How many of them would run at once."""
    tasks: Sequence[PlannedTask]
    is_compared: bool
    """False if too many own paths to say of each what it follows."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """A whole run."""

    repository: str
    base: str
    target: str
    sandbox: str
    sessions: int
    """How many would run at once at most."""
    limited_by: str | None
    """What keeps that below the file's `capacity`, if the machine does."""
    waves: Sequence[PlannedWave]
    findings: Sequence[Finding] = ()
    """The problems and warnings of `council doctor`."""

    def to_json(self) -> JsonObject:
        """Return the result object of `run --dry-run`."""
        return {"status": "planned", **asdict(self)}


def starting_adapters(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Return the adapters that would start each task, the best first; what will skip a phase is not known yet."""
    new = TaskDocument()
    return {
        task.id: current_adapters(
            Workflow(config.phases_of(task.workflow) or DEFAULT_PHASES), new, task.adapter, task.fallback
        )
        for task in config.tasks
    }


def build_dry_run(
    config: RunConfig,
    starting: Mapping[str, tuple[str, ...]],
    programs: Mapping[str, str],
    room: SessionFit,
    *,
    target: str,
    repository: str,
    sandbox: str,
) -> DryRun:
    """Return what a run of `config` would do.

    `starting` are the adapters that would start its tasks, `programs` what they would run, `room` is what the machine
    has.
    """
    specs = {task.id: task for task in config.tasks}
    entries = {
        task.id: DispatchEntry(task.needs, starting[task.id][0], task.priority, task.owns, starting[task.id][1:])
        for task in config.tasks
    }
    limits = {name: one.capacity for name, one in config.adapters.items() if one.capacity is not None}

    def planned(task: str, follows: str | None) -> PlannedTask:
        starts_from = target if specs[task].builds_on_target else config.base
        phases = [phase.name for phase in config.phases_of(specs[task].workflow)]
        return _task(specs[task], follows, starting[task][0], phases, programs[task], starts_from)

    waves = [
        PlannedWave(
            count_concurrent_sessions(wave, entries, limits, room.sessions),
            [planned(task, wave.follows.get(task)) for task in wave.tasks],
            wave.is_compared,
        )
        for wave in plan_waves(entries)
    ]
    most = max(wave.sessions for wave in waves)
    return DryRun(repository, config.base, target, sandbox, most, room.limited_by, waves)


def _task(
    spec: TaskSpec, follows: str | None, adapter: str, phases: Sequence[str], program: str, starts_from: str
) -> PlannedTask:
    return PlannedTask(
        id=spec.id,
        needs=spec.needs,
        follows=follows,
        adapter=adapter,
        phases=phases,
        program=program,
        starts_from=starts_from,
        checks=spec.checks,
        attempts=spec.attempts,
        timeout=spec.timeout,
        idle_timeout=spec.idle_timeout,
        priority=spec.priority,
    )
