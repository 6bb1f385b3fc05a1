"""Check all prerequisites of a run, and store nothing; programs are probed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

import anyio
import anyio.to_thread

from orchestrator.config.adapters import make_trial_request
from orchestrator.config.inline import no_program_error
from orchestrator.config.model import RunConfig, make_adapters, used_adapters
from orchestrator.config.store import require_local_folder, store_folder, to_store_url
from orchestrator.config.warnings import find_warnings
from orchestrator.domain.scheduling.admission import DEFAULT_DEMAND, SessionDemand
from orchestrator.domain.sessions.shell_commands import (
    find_programs,
    find_script,
    is_in_worktree,
    make_chmod_hint,
    make_lookup_command,
    may_create,
)
from orchestrator.domain.settings.run_settings import SandboxSettings
from orchestrator.engine.diagnostics import findings
from orchestrator.engine.diagnostics.facts import Machine, StorageLocation, inspect_location, inspect_machine
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.engine.diagnostics.preflight import find_surroundings
from orchestrator.engine.diagnostics.programs import make_default_adapters, probe_adapters
from orchestrator.engine.diagnostics.repository_findings import (
    RepositoryInspection,
    check_referenced_files,
    covers,
    ignored_in,
    inspect_repository,
    is_generated,
)
from orchestrator.engine.diagnostics.sandbox_probe import DEFAULT_SANDBOX, SandboxProbe, check_adapter_programs
from orchestrator.errors import ConfigError, GitError, RefusedError
from orchestrator.plugins import SkippedPlugin
from orchestrator.project import Project, council_home
from orchestrator.protocols import AdapterType
from orchestrator.repo.git.command import Git, printable_name, read_version
from orchestrator.sessions.sandbox.policy import SandboxKind, choose_sandbox
from orchestrator.state.log.identity import find_trust_error

_DEFAULT_CAPACITY: Final = 4


@dataclass(frozen=True, slots=True)
class DoctorInput:
    """A folder, a config file with its config or errors, and the installed plugins."""

    folder: Path
    file: Path | None = None
    config: RunConfig | ConfigError | None = None
    types: Mapping[str, AdapterType] = field(default_factory=dict)
    left_out: Sequence[SkippedPlugin] = ()
    """Unusable plugins, each with the reason."""

    @property
    def run(self) -> RunConfig | None:
        """The config, if it is valid."""
        return self.config if isinstance(self.config, RunConfig) else None

    @property
    def capacity(self) -> int:
        """The number of concurrent sessions."""
        return _DEFAULT_CAPACITY if self.run is None else self.run.capacity


async def run_doctor(subject: DoctorInput, environ: Mapping[str, str]) -> list[Finding]:
    """Return all findings, in the recommended order of fixing them."""
    machine = await anyio.to_thread.run_sync(inspect_machine)
    git = findings.check_git(await read_version(environ))
    inspection, found = RepositoryInspection([]), dict[str, list[Finding]]()

    async def collect(name: str, check: Awaitable[list[Finding]]) -> None:
        found[name] = await check

    async with anyio.create_task_group() as group:
        group.start_soon(collect, "adapters", _check_adapters(subject, environ))
        group.start_soon(collect, "sandbox", _check_sandbox(subject.run, environ))
        if git.level is not Level.PROBLEM:
            inspection = await inspect_repository(subject.run, subject.folder, environ)
    project = _project(subject, inspection)
    locations, unusable = await anyio.to_thread.run_sync(_inspect_locations, subject, project, environ)
    programs = await _check_programs(subject, inspection, environ)
    hidden = {one.name for one in programs if one.level is not Level.OK}
    adapters = [one for one in found["adapters"] if one.level is not Level.OK or one.name not in hidden]
    has_file = subject.file is not None or inspection.top is not None
    file = [findings.check_file(subject.file, subject.config)] if has_file else []
    if subject.run is not None:
        around = await find_surroundings(subject.run, environ)
        own = await anyio.to_thread.run_sync(make_adapters, subject.run.adapters, subject.types)
        file += map(findings.warning_finding, find_warnings(subject.run, around, own))
    return [
        findings.check_system(machine),
        git,
        *inspection.findings,
        *file,
        *([] if subject.run is None else await check_files(subject.run, subject.types, inspection.top, environ)),
        *programs,
        *adapters,
        *found["sandbox"],
        *unusable,
        *_check_disks(subject.capacity, inspection, locations),
        *_check_resources(subject, machine),
        findings.check_clock(machine, list(locations.values())),
        *map(findings.plugin_finding, subject.left_out),
    ]


async def _check_adapters(subject: DoctorInput, environ: Mapping[str, str]) -> list[Finding]:
    """Check the file's adapters; without a file, all that need no options."""
    run = subject.run
    if isinstance(subject.config, ConfigError):  # the invalid file may define its own adapters
        return []
    if run is None:
        made, _ = await anyio.to_thread.run_sync(make_default_adapters, subject.types)
    else:
        made = make_adapters(run.adapters, subject.types)
    tasks = () if run is None else (*run.tasks, *filter(None, [run.template]))
    used = set() if run is None else {name for task in tasks for name in run.adapters_of(task)}
    statuses = await probe_adapters(made, environ)
    installed = [name for name, status in statuses.items() if status.is_installed]
    if run is None and not installed:  # one line for all of them
        return [findings.refusal_finding("adapters", no_program_error(made))]
    if run is None:
        made = {name: made[name] for name in installed}  # nobody needs the others
    return [one for name in made for one in findings.check_adapter(name, statuses[name], is_used=name in used)]


async def check_files(
    run: RunConfig, types: Mapping[str, AdapterType], top: Path | None, environ: Mapping[str, str]
) -> list[Finding]:
    """Check that files used by adapters and checks are visible to sessions.

    `top` is the checkout of the repository, if there is one.
    """
    if top is None:
        return []
    adapters = used_adapters(run, types)
    argvs = [adapters[task.adapter].command(make_trial_request(task.id, task.prompt)).argv for task in run.tasks]
    checks = dict.fromkeys(check for task in run.tasks for check in task.check_commands)
    programs = {name for check in checks for name in find_programs(check)}  # see `_check_programs`
    words = [*chain.from_iterable(argvs), *chain.from_iterable(map(str.split, checks))]
    scripts = [name for argv in argvs if (name := find_script(argv)) is not None]
    named = [word for word in words if word not in programs]
    executed = [argv[0] for argv in argvs if is_in_worktree(argv[0])]
    return await check_referenced_files(run, named, scripts, executed, top, environ)


async def _check_programs(
    subject: DoctorInput, inspection: RepositoryInspection, environ: Mapping[str, str]
) -> list[Finding]:
    """Check that programs of checks, setup and adapters are visible in the sandbox."""
    run = subject.run
    if inspection.site is None:
        return []
    project = Project(inspection.top or (subject.folder if run is None else run.path.parent))
    folder = project.state_folder if run is None or run.state.url is None else store_folder(run.state.url)
    sandbox = DEFAULT_SANDBOX if run is None else run.sandbox
    probe = await SandboxProbe.open(sandbox, inspection.site, project, [folder] if folder else [], environ)
    try:
        if probe is None or isinstance(subject.config, ConfigError):
            return []
        if run is None:
            made, _ = await anyio.to_thread.run_sync(make_default_adapters, subject.types)
            return await check_adapter_programs(made, {}, subject.file, probe, environ, Level.WARNING)
        found = await check_command_programs(run, inspection.top, probe, environ)
        used = await anyio.to_thread.run_sync(used_adapters, run, subject.types)
        return found + await check_adapter_programs(used, run.adapters, subject.file, probe, environ)
    except RefusedError as error:
        return [findings.refusal_finding("programs", error)]


async def _check_sandbox(run: RunConfig | None, environ: Mapping[str, str]) -> list[Finding]:
    config = DEFAULT_SANDBOX if run is None else run.sandbox
    kind = await _choose_sandbox(config, environ)
    weaker_for = None
    if kind is SandboxKind.LANDLOCK and config.sandbox == "auto":
        stronger = await _choose_sandbox(config.model_copy(update={"sandbox": SandboxKind.BUBBLEWRAP}), environ)
        weaker_for = stronger if isinstance(stronger, RefusedError) else None
    return [findings.check_sandbox(kind, weaker_for)]


async def _choose_sandbox(config: SandboxSettings, environ: Mapping[str, str]) -> SandboxKind | RefusedError:
    try:
        return await choose_sandbox(config.sandbox, network=config.has_network, hosts=config.hosts, environ=environ)
    except RefusedError as error:
        return error


def _project(subject: DoctorInput, inspection: RepositoryInspection) -> Project | None:
    """Return the project that `council run` would use."""
    if inspection.top is not None:
        return Project(inspection.top)
    return None if subject.file is None else Project(subject.file.absolute().parent)


def _inspect_locations(
    subject: DoctorInput, project: Project | None, environ: Mapping[str, str]
) -> tuple[dict[str, StorageLocation], list[Finding]]:
    """Return the folders that a run writes to, and findings about unusable ones."""
    locations: dict[str, StorageLocation] = {}
    unusable: list[Finding] = []
    try:
        locations["repositories"] = inspect_location(council_home(environ))
    except RefusedError as error:
        unusable.append(findings.refusal_finding("repositories", error))
    try:
        state = _state_folder(subject, project, environ)
        if state is not None:
            locations["state"] = inspect_location(state)
            if (refused := find_trust_error(state, council_home(environ))) is not None:
                unusable.append(findings.refusal_finding("state", refused))
    except RefusedError as error:
        unusable.append(findings.refusal_finding("state", error))
    try:
        locations["temporary"] = inspect_location(Path(tempfile.gettempdir()))
    except OSError as error:
        remedy = "set TMPDIR to a writable folder"
        unusable.append(Finding("temporary", Level.PROBLEM, error.strerror or str(error), remedy))
    return locations, unusable


def _state_folder(subject: DoctorInput, project: Project | None, environ: Mapping[str, str]) -> Path | None:
    """Return the folder of the state store; None if it is unknown or not a folder."""
    url = to_store_url(environ.get("COUNCIL_STATE", "")) or (None if subject.run is None else subject.run.state.url)
    if url:
        return require_local_folder(url)
    return None if project is None else project.state_folder


def _check_disks(
    capacity: int, inspection: RepositoryInspection, locations: Mapping[str, StorageLocation]
) -> list[Finding]:
    needs = {
        "repositories": findings.hub_need(inspection.size, capacity),
        "state": findings.state_need(capacity),
        "temporary": findings.TEMPORARY_NEED,
    }
    space = [findings.check_space(name, location, needs[name]) for name, location in locations.items()]
    disks = [findings.check_file_system(name, location) for name, location in locations.items() if name != "temporary"]
    home = locations.get("repositories")
    inside = None if home is None or inspection.top is None else findings.check_home(home.path, inspection.top)
    return [*space, *filter(None, (*disks, inside))]


def _check_resources(subject: DoctorInput, machine: Machine) -> list[Finding]:
    demand = DEFAULT_DEMAND if subject.run is None else SessionDemand(memory=subject.run.session_memory)
    return [
        findings.check_descriptors(machine.resources, subject.capacity),
        findings.check_memory(machine.resources, subject.capacity, demand),
        findings.check_processes(machine.processes, subject.capacity),
    ]


_EXECUTABLE: Final = "100755"
_TITLE: Final = "programs"


class _Command(NamedTuple):
    """The kind and text of a command in the file, and its environment variable names."""

    kind: str
    text: str
    env: tuple[str, ...]
    may_fail: bool = False
    """Whether the command may fail on the base: then a task may add its program to the worktree."""


def list_commands(run: RunConfig) -> list[_Command]:
    """Return the setup and check commands of a run, without duplicates."""
    trees = run.worktrees
    found = [_Command("setup", step.run, trees.env) for step in trees.setup]
    found += [_Command("before_run", one, trees.env) for one in trees.before_run]
    must_pass = {check for task in run.tasks if not task.allow_failing_base for check in task.check_commands}
    found += [
        _Command("check", one, task.checks_env, one not in must_pass)
        for task in run.tasks
        for one in task.check_commands
    ]
    return list(dict.fromkeys(found))


async def check_command_programs(
    run: RunConfig, top: Path | None, probe: SandboxProbe, environ: Mapping[str, str]
) -> list[Finding]:
    """Return problems with programs of checks and setup, or one positive finding."""
    commands = list_commands(run)
    if not commands:
        return []
    by_env: dict[tuple[str, ...], set[str]] = {}
    for one in commands:
        by_env.setdefault(one.env, set()).update(name for name in find_programs(one.text) if not is_in_worktree(name))
    there = {
        env: await probe.find_succeeding([make_lookup_command(name) for name in names], env)
        for env, names in by_env.items()
    }
    names = [name for one in commands for name in _in_worktree(one)]
    files = await _committed(run, top, names, environ)
    ignored = set() if top is None else await ignored_in(top, names, environ)

    def check_files() -> list[Finding | None]:
        absent = [
            (one, name)
            for one in commands
            for name in find_programs(one.text)
            if not is_in_worktree(name) and make_lookup_command(name) not in there[one.env]
        ]
        found: list[Finding | None] = [_missing_program(one, name, probe, top) for one, name in absent]
        return found + [
            _check_file(run, one, name, files, top, ignored) for one in commands for name in _in_worktree(one)
        ]

    found = [one for one in await anyio.to_thread.run_sync(check_files) if one is not None]
    return found or [Finding(_TITLE, Level.OK, "programs of checks and setup are available in the sandbox")]


def _in_worktree(command: _Command) -> list[str]:
    """Return the programs of a command that are paths in the worktree."""
    names = find_programs(command.text)
    return [] if "cd" in names or "pushd" in names else [name for name in names if is_in_worktree(name)]


async def _committed(
    run: RunConfig, top: Path | None, names: Iterable[str], environ: Mapping[str, str]
) -> Mapping[str, str]:
    """Return the modes of files in the base, by path; missing files are omitted."""
    if top is None:
        return {}
    git = Git(None, as_user=True, environ=environ)
    try:
        entries = await git.entries(run.base, set(map(os.path.normpath, names)), top)
    except GitError:  # problems with the base are reported separately
        return {}
    return {path: entry.split()[0] for path, entry in entries.items()}


def _missing_program(command: _Command, name: str, probe: SandboxProbe, top: Path | None) -> Finding:
    searched, hidden = probe.explain_missing_program(name, command.env)
    message = f"{_describe_command(command)}: program {name!r} not found in the sandbox{searched}"
    local = next((one for one in (".venv", "venv", "node_modules/.bin") if _has(top, one, name)), None)
    if local is not None:
        folder = local if local.startswith("node") else f"{local}/bin"
        remedy = f"create {local.split('/')[0]} in `worktrees.setup`, and call it as {folder}/{name}: {_ONLY_COMMITTED}"
    elif hidden:
        remedy = f"add {', '.join(hidden)} to `readable`, or install it elsewhere"
    else:
        remedy = "install it, or create it in `worktrees.setup` and call it by its path in the worktree"
    return Finding(_TITLE, Level.PROBLEM, printable_name(message), printable_name(remedy))


_ONLY_COMMITTED: Final = "worktrees contain only committed files"


def _has(top: Path | None, folder: str, name: str) -> bool:
    if "/" in name:
        return False
    inner = folder if folder.startswith("node") else f"{folder}/bin"
    return top is not None and os.path.lexists(top / inner / name)


def _check_file(
    run: RunConfig,
    command: _Command,
    name: str,
    files: Mapping[str, str],
    top: Path | None,
    ignored: Collection[str],
) -> Finding | None:
    path = os.path.normpath(name)
    if path in files:
        if files[path] == _EXECUTABLE:
            return None
        message = f"{_describe_command(command)}: {name} is not executable in {run.base}"
        return Finding(_TITLE, Level.PROBLEM, printable_name(message), make_chmod_hint(path))
    trees = run.worktrees
    is_provided = any(covers(one, path) for one in (*trees.copied, *trees.linked))
    if trees.setup or (is_provided and command.kind != "setup"):
        return None
    message = f"{_describe_command(command)}: {name} is not in {run.base}, and no `setup` creates it"
    is_of_tools = is_generated(top or Path(), path)
    is_uncommitted = is_of_tools or path in ignored
    if command.may_fail and (not is_uncommitted or may_create(command.text, name)):
        return Finding(_TITLE, Level.WARNING, printable_name(message), "commit it, unless a task adds it")
    remedy = f"create it in `worktrees.setup`: {_ONLY_COMMITTED}"
    if is_uncommitted and not is_of_tools:
        remedy = f"list it under `worktrees.copy`, or {remedy}"
    if not is_uncommitted:
        is_there = top is not None and os.path.lexists(top / path)
        remedy = "commit it" if is_there else f"commit it, or {remedy}"
    return Finding(_TITLE, Level.PROBLEM, printable_name(message), remedy)


def _describe_command(command: _Command) -> str:
    line = " ".join(command.text.split())
    return f"{command.kind} `{line if len(line) <= 60 else f'{line[:60]}…'}`"
