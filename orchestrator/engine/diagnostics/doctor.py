"""Looks at all that a run needs, before there is one: what answers a question is started, nothing is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from orchestrator.config.adapters import make_trial_request
from orchestrator.config.inline import no_program_error
from orchestrator.config.model import RunConfig, SandboxConfig, make_adapters, used_adapters
from orchestrator.config.store import folder_url, require_local_folder, to_store_url
from orchestrator.config.warnings import find_warnings
from orchestrator.domain.scheduling.admission import DEFAULT_DEMAND, SessionDemand
from orchestrator.domain.sessions.shell_commands import find_programs, find_script
from orchestrator.engine.diagnostics import findings
from orchestrator.engine.diagnostics.adapter_programs import look_for_adapter_programs
from orchestrator.engine.diagnostics.facts import Machine, StorageLocation, inspect_location, inspect_machine
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.preflight import find_surroundings
from orchestrator.engine.diagnostics.program_findings import check_command_programs
from orchestrator.engine.diagnostics.programs import make_default_adapters, probe_adapters
from orchestrator.engine.diagnostics.repository_findings import (
    RepositoryInspection,
    check_referenced_files,
    inspect_repository,
)
from orchestrator.engine.diagnostics.sandbox_probe import DEFAULT_SANDBOX, SandboxProbe
from orchestrator.errors import ConfigError, RefusedError
from orchestrator.project import Project, council_home
from orchestrator.protocols import AdapterType
from orchestrator.repo.git.command import read_version
from orchestrator.sessions.sandbox.policy import SandboxKind, choose_sandbox
from orchestrator.state.log.identity import find_trust_error

_DEFAULT_CAPACITY: Final = 4


@dataclass(frozen=True, slots=True)
class DoctorInput:
    """What is looked at: a folder, the file of a run with its config or its mistakes, and what is installed."""

    folder: Path
    file: Path | None = None
    config: RunConfig | ConfigError | None = None
    types: Mapping[str, AdapterType] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    """Plugins that can't be used, and why."""

    @property
    def run(self) -> RunConfig | None:
        """The config, if there is one without mistakes."""
        return self.config if isinstance(self.config, RunConfig) else None

    @property
    def capacity(self) -> int:
        """How many sessions there would be at once."""
        return _DEFAULT_CAPACITY if self.run is None else self.run.capacity


async def run_doctor(subject: DoctorInput, environ: Mapping[str, str]) -> list[Finding]:
    """Return all that was found, what comes first to be mended first."""
    machine = await anyio.to_thread.run_sync(inspect_machine)
    git = findings.judge_git(await read_version(environ))
    looked, found = RepositoryInspection([]), dict[str, list[Finding]]()

    async def look(name: str, findings_of: Awaitable[list[Finding]]) -> None:
        found[name] = await findings_of

    async with anyio.create_task_group() as group:
        group.start_soon(look, "adapters", _adapters(subject, environ))
        group.start_soon(look, "sandbox", _sandbox(subject.run, environ))
        if git.level is not Level.PROBLEM:
            looked = await inspect_repository(subject.run, subject.folder, environ)
    places, troubles = await anyio.to_thread.run_sync(_inspect_locations, subject, _project(subject, looked), environ)
    programs = await _programs(subject, looked, environ)
    hidden = {one.name for one in programs if one.level is not Level.OK}
    adapters = [one for one in found["adapters"] if one.level is not Level.OK or one.name not in hidden]
    file = [] if subject.file is None and looked.top is None else [findings.judge_file(subject.file, subject.config)]
    if subject.run is not None:
        around = await find_surroundings(subject.run, environ)
        own = await anyio.to_thread.run_sync(make_adapters, subject.run.adapters, subject.types)
        file += map(findings.judge_warning, find_warnings(subject.run, around, own))
    return [
        findings.judge_system(machine),
        git,
        *looked.findings,
        *file,
        *await _files(subject, looked, environ),
        *programs,
        *adapters,
        *found["sandbox"],
        *troubles,
        *_judge_disks(subject.capacity, looked, places),
        *_judge_resources(subject, machine),
        findings.judge_clock(machine, list(places.values())),
        *map(findings.judge_plugin, subject.left_out),
    ]


async def _adapters(subject: DoctorInput, environ: Mapping[str, str]) -> list[Finding]:
    """Look at the adapters of the file, or else at all that can be made without options."""
    run = subject.run
    if run is None:
        made, _ = await anyio.to_thread.run_sync(make_default_adapters, subject.types)
    else:
        made = make_adapters(run.adapters, subject.types)
    tasks = () if run is None else (*run.tasks, *filter(None, [run.template]))
    used = set() if run is None else {name for task in tasks for name in run.adapters_of(task)}
    statuses = await probe_adapters(made, environ)
    found = [one for name in made for one in findings.judge_adapter(name, statuses[name], is_used=name in used)]
    if subject.config is None and not any(one.is_installed for one in statuses.values()):
        found.insert(0, findings.refusal_finding("adapters", no_program_error(made)))
    return found


async def _files(subject: DoctorInput, looked: RepositoryInspection, environ: Mapping[str, str]) -> list[Finding]:
    """Look whether what the adapters and checks of a file name is there for sessions, too."""
    run = subject.run
    if run is None or looked.top is None:
        return []
    adapters = used_adapters(run, subject.types)
    argvs = [adapters[task.adapter].command(make_trial_request(task.id, task.prompt)).argv for task in run.tasks]
    checks = dict.fromkeys(check for task in run.tasks for check in task.checks)
    programs = {name for check in checks for name in find_programs(check)}  # which `_programs` looks for
    words = [*chain.from_iterable(argvs), *chain.from_iterable(map(str.split, checks))]
    scripts = [name for argv in argvs if (name := find_script(argv)) is not None]
    return await check_referenced_files(
        run, (one for one in words if one not in programs), scripts, looked.top, environ
    )


async def _programs(subject: DoctorInput, looked: RepositoryInspection, environ: Mapping[str, str]) -> list[Finding]:
    """Look whether the sandbox shows the programs of checks, setup and adapters."""
    run = subject.run
    if looked.site is None:
        return []
    project = Project(looked.top or (subject.folder if run is None else run.path.parent))
    store = (None if run is None else run.state.url) or folder_url(project.state_folder)
    fence = DEFAULT_SANDBOX if run is None else run.fence
    probe = await SandboxProbe.open(fence, looked.site, project, store, environ)
    try:
        if probe is None:
            return []
        if run is None:
            made, _ = await anyio.to_thread.run_sync(make_default_adapters, subject.types)
            return await look_for_adapter_programs(made, {}, subject.file, probe, environ, Level.WARNING)
        found = await check_command_programs(run, looked.top, probe, environ)
        used = await anyio.to_thread.run_sync(used_adapters, run, subject.types)
        return found + await look_for_adapter_programs(used, run.adapters, subject.file, probe, environ)
    except RefusedError as error:
        return [findings.refusal_finding("programs", error)]


async def _sandbox(run: RunConfig | None, environ: Mapping[str, str]) -> list[Finding]:
    fence = DEFAULT_SANDBOX if run is None else run.fence
    kind = await _choose_sandbox(fence, environ)
    weaker_for = None
    if kind is SandboxKind.LANDLOCK and fence.sandbox == "auto":
        other = await _choose_sandbox(fence.model_copy(update={"sandbox": SandboxKind.BUBBLEWRAP}), environ)
        weaker_for = other if isinstance(other, RefusedError) else None
    return [findings.judge_sandbox(kind, weaker_for)]


async def _choose_sandbox(fence: SandboxConfig, environ: Mapping[str, str]) -> SandboxKind | RefusedError:
    try:
        return await choose_sandbox(fence.sandbox, network=fence.network, hosts=fence.hosts, environ=environ)
    except RefusedError as error:
        return error


def _project(subject: DoctorInput, looked: RepositoryInspection) -> Project | None:
    """Return the project that a run would be of, as `council run` would have it."""
    if looked.top is not None:
        return Project(looked.top)
    return None if subject.file is None else Project(subject.file.absolute().parent)


def _inspect_locations(
    subject: DoctorInput, project: Project | None, environ: Mapping[str, str]
) -> tuple[dict[str, StorageLocation], list[Finding]]:
    """Return what there is of the places that a run writes to, and what is wrong with those that there are none of."""
    places: dict[str, StorageLocation] = {}
    troubles: list[Finding] = []
    try:
        places["repositories"] = inspect_location(council_home(environ))
    except RefusedError as error:
        troubles.append(findings.refusal_finding("repositories", error))
    try:
        state = _state_folder(subject, project, environ)
        if state is not None:
            places["state"] = inspect_location(state)
            if (refused := find_trust_error(state, council_home(environ))) is not None:
                troubles.append(findings.refusal_finding("state", refused))
    except RefusedError as error:
        troubles.append(findings.refusal_finding("state", error))
    try:
        places["temporary"] = inspect_location(Path(tempfile.gettempdir()))
    except OSError as error:
        remedy = "set TMPDIR to a folder that can be written to"
        troubles.append(Finding("temporary", Level.PROBLEM, error.strerror or str(error), remedy))
    return places, troubles


def _state_folder(subject: DoctorInput, project: Project | None, environ: Mapping[str, str]) -> Path | None:
    """Return the folder of the state; None where it is in no folder, or not known."""
    url = to_store_url(environ.get("COUNCIL_STATE", "")) or (None if subject.run is None else subject.run.state.url)
    if url:
        return require_local_folder(url)
    return None if project is None else project.state_folder


def _judge_disks(capacity: int, looked: RepositoryInspection, places: Mapping[str, StorageLocation]) -> list[Finding]:
    needs = {
        "repositories": findings.hub_need(looked.size, capacity),
        "state": findings.state_need(capacity),
        "temporary": findings.TEMPORARY_NEED,
    }
    space = [findings.judge_space(name, place, needs[name]) for name, place in places.items()]
    disks = [findings.judge_file_system(name, place) for name, place in places.items() if name != "temporary"]
    home = places.get("repositories")
    inside = None if home is None or looked.top is None else findings.judge_home(home.path, looked.top)
    return [*space, *filter(None, (*disks, inside))]


def _judge_resources(subject: DoctorInput, machine: Machine) -> list[Finding]:
    demand = DEFAULT_DEMAND if subject.run is None else SessionDemand(memory=subject.run.session_memory)
    return [
        findings.judge_descriptors(machine.room, subject.capacity),
        findings.judge_memory(machine.room, subject.capacity, demand),
        findings.judge_processes(machine.processes, subject.capacity),
    ]
