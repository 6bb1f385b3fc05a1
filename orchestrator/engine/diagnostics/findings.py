"""Rate facts about a machine and a repository: OK, warning or problem. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final

from orchestrator.config.model import RunConfig
from orchestrator.config.warnings import ConfigWarning
from orchestrator.domain.scheduling.admission import MIB, AvailableResources, SessionDemand, SessionFit, fit_sessions
from orchestrator.engine.diagnostics.facts import Machine, RepositorySize, StorageLocation
from orchestrator.engine.diagnostics.programs import AdapterStatus, ProgramStatus
from orchestrator.errors import RESOURCE_MESSAGES, ConfigError, RefusedError
from orchestrator.plugins import SkippedPlugin
from orchestrator.repo.git.command import MINIMUM_VERSION, RECOMMENDED_VERSION, is_at_least
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.state.log.mounts import NETWORK_FILE_SYSTEMS

_GIB: Final = 1 << 30
_DAY: Final = 86400.0
#: File systems that lose their content on restart.
_MEMORY_FILE_SYSTEMS: Final = frozenset({"ramfs", "tmpfs"})
#: The number of processes and threads of a session: sandbox, supervisor, the CLI and its threads, a build.
_PROCESSES: Final = 64
#: The size of a session's output (both streams) in bytes, see `orchestrator.sessions.supervision.capture`.
_OUTPUT: Final = 2 * 17 * MIB
#: The bytes and number of files to keep free at each location.
_SPARE: Final = 64 * MIB
_SPARE_FILES: Final = 1000
_MAX_CLOCK_SKEW: Final = 5.0  # seconds
_LATEST_CREDIBLE: Final = datetime(2100, 1, 1, tzinfo=UTC).timestamp()


class Level(StrEnum):
    """The severity of a finding."""

    OK = "ok"
    WARNING = "warning"  #: a run can start
    PROBLEM = "problem"  #: a run can't start, or is not reliable


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, with its remedy."""

    name: str
    level: Level
    message: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class SpaceNeed:
    """The required disk space: bytes for one session and for a run, and files."""

    least: int
    all: int
    files: int


def refusal_finding(name: str, error: RefusedError) -> Finding:
    """Return a refusal as a finding."""
    return Finding(name, Level.PROBLEM, error.message, error.remedy)


def check_system(machine: Machine) -> Finding:
    """Check the operating system and the version of Python."""
    found = f"Python {machine.python} on {machine.system}"
    if machine.system not in {"Linux", "Darwin"}:
        return Finding("system", Level.PROBLEM, found, "use Linux or macOS (on Windows: WSL)")
    return Finding("system", Level.OK, found)


def check_git(version: str | None) -> Finding:
    """Check the version of git; None: git is not installed."""
    least = ".".join(map(str, MINIMUM_VERSION))
    if version is None:
        return Finding("git", Level.PROBLEM, "git is not on PATH", f"install git {least} or newer")
    if not is_at_least(version, MINIMUM_VERSION):
        return Finding("git", Level.PROBLEM, f"git {version} is too old", f"install git {least} or newer")
    if not is_at_least(version, RECOMMENDED_VERSION):
        wanted = ".".join(map(str, RECOMMENDED_VERSION))
        return Finding(
            "git", Level.WARNING, f"git {version}", f"install git {wanted} or newer: older versions are untested"
        )
    return Finding("git", Level.OK, f"git {version}")


def check_file(file: Path | None, config: RunConfig | ConfigError | None) -> Finding:
    """Check the config file, given its config or its errors; None: there is no file."""
    if isinstance(config, ConfigError):
        first, *others = config.problems
        more = f" (and {len(others)} more: run `council validate`)" if others else ""
        location = f"{first.file}:{first.line}:{first.column}"
        return Finding("file", Level.PROBLEM, f"{location}: {first.message}{more}", first.remedy)
    if config is None:
        return Finding("file", Level.WARNING, "no council.yaml found here", "create one with `council init`")
    adapters = ", ".join(config.adapters)
    return Finding("file", Level.OK, f"{file}: tasks: {len(config.tasks)}, adapters: {adapters}")


def warning_finding(warning: ConfigWarning) -> Finding:
    """Return a warning of `council validate` as a finding."""
    return Finding("file", Level.WARNING, warning.message, warning.remedy)


def check_adapter(name: str, status: AdapterStatus, *, is_used: bool) -> list[Finding]:
    """Check the programs of an adapter; if it is unused, problems are warnings."""
    bad = Level.PROBLEM if is_used else Level.WARNING
    title = f"adapter {name}"
    if status.error is not None:
        return [Finding(title, bad, status.error, "correct its options, or update the plugin that provides it")]
    if not status.programs:
        return [Finding(title, Level.OK, "has no program to check")]
    return [_check_program(title, program, bad) for program in status.programs]


def _check_program(title: str, program: ProgramStatus, bad: Level) -> Finding:
    if program.path is None:
        return Finding(title, bad, f"{program.name} is {program.error}", program.remedy)
    found = describe(program)
    if program.ready is False:
        return Finding(title, bad, found, program.remedy)
    if program.is_supported is False:
        remedy = f"supported: {program.name} {program.supported}; install such a version if this one does not work"
        return Finding(title, Level.WARNING, found, remedy)
    if program.error is not None:
        return Finding(title, Level.WARNING, found, f"run `{program.name}` manually to see its error")
    return Finding(title, Level.OK, found)


def describe(program: ProgramStatus) -> str:
    """Return a short description of a program: version, readiness, path, untested version, error."""
    if program.path is None:
        return f"{program.name}: {program.error}"
    readiness = {True: "ready", False: "not ready", None: None}[program.ready]
    name = f"{Path(program.name).name} {program.version or ''}".strip()
    parts = (name, readiness, program.path, _comparison(program), program.error)
    return ", ".join(part for part in parts if part)


def _comparison(program: ProgramStatus) -> str | None:
    """Return how its version differs from the verified ones."""
    if program.compared is None or program.is_supported is False:
        return None
    *others, last = program.verified or ()
    return (
        f"{program.compared} than the verified version {last}"
        if not others
        else (f"{program.compared} than the verified versions {', '.join(others)} and {last}")
    )


def check_sandbox(kind: SandboxKind | RefusedError, weaker_for: RefusedError | None = None) -> Finding:
    """Check the available sandbox.

    `weaker_for` is the reason why Landlock replaces bubblewrap.
    """
    if isinstance(kind, RefusedError):
        return refusal_finding("sandbox", kind)
    if kind is SandboxKind.OFF:
        found = "off: sessions can access everything that you can"
        return Finding(
            "sandbox", Level.WARNING, found, "remove `sandbox: off`, unless sessions are sandboxed by other means"
        )
    if kind is SandboxKind.LANDLOCK and weaker_for is not None:
        found = f"landlock, the weaker sandbox: {weaker_for.message}"
        return Finding("sandbox", Level.WARNING, found, weaker_for.remedy)
    return Finding("sandbox", Level.OK, f"{kind} works")


def check_descriptors(resources: AvailableResources, capacity: int) -> Finding:
    """Check the limit of open files."""
    limit = "no limit" if resources.descriptor_limit is None else f"at most {resources.descriptor_limit}"
    return _check_resource(
        "open files",
        limit,
        AvailableResources(resources.descriptor_limit, resources.descriptors_open, None),
        capacity,
        SessionDemand(),
    )


def check_memory(resources: AvailableResources, capacity: int, demand: SessionDemand) -> Finding:
    """Check the available memory."""
    if resources.memory is None:
        return Finding("memory", Level.OK, "available memory is unknown on this system")
    return _check_resource(
        "memory",
        f"{_size(resources.memory)} available",
        AvailableResources(None, 0, resources.memory),
        capacity,
        demand,
    )


def _check_resource(
    name: str, found: str, resources: AvailableResources, capacity: int, demand: SessionDemand
) -> Finding:
    fitting = fit_sessions(resources, capacity, demand)
    if not isinstance(fitting, SessionFit):
        return Finding(name, Level.PROBLEM, fitting.message, fitting.remedy)
    if fitting.limited_by is not None:
        message, _, remedy = fitting.limited_by.rpartition(": ")
        return Finding(name, Level.WARNING, message, remedy)
    return Finding(name, Level.OK, f"{found}, enough for {capacity} sessions")


def check_processes(left: int | None, capacity: int) -> Finding:
    """Check how many more processes and threads can be started."""
    if left is None:
        return Finding("processes", Level.OK, "no known limit")
    found = f"{left} more processes and threads are allowed"
    remedy = "raise the limit with `ulimit -u` (or the options of your container runtime), or lower `capacity`"
    if left < _PROCESSES:
        return Finding("processes", Level.PROBLEM, f"{found}, too few for a session", remedy)
    if left < _PROCESSES * capacity:
        return Finding("processes", Level.WARNING, f"{found}, but a session may need {_PROCESSES}", remedy)
    return Finding("processes", Level.OK, found)


def hub_need(size: RepositorySize | None, capacity: int) -> SpaceNeed:
    """Return the space for a hub: all objects, and two checkouts per session.

    The second checkout is for checks.
    """
    size = size or RepositorySize(0, 0, 0)
    per_session, base = 2 * size.checkout, size.objects + _SPARE
    return SpaceNeed(base + per_session, base + per_session * capacity, 2 * size.files * capacity + _SPARE_FILES)


def state_need(capacity: int) -> SpaceNeed:
    """Return the space for the state store and several outputs per session."""
    return SpaceNeed(_SPARE, _SPARE + 4 * _OUTPUT * capacity, _SPARE_FILES)


TEMPORARY_NEED: Final = SpaceNeed(MIB, _SPARE, 100)


def check_space(name: str, place: StorageLocation, need: SpaceNeed) -> Finding:
    """Check that a location is writable and has enough free space."""
    if place.error is not None:
        fix = RESOURCE_MESSAGES.get(place.error, "make it writable")
        remedy = f"{fix}, or use another folder ({_LOCATION_VARIABLES[name]})"
        return Finding(name, Level.PROBLEM, f"{place.path} is not writable: {place.error}", remedy)
    left = "" if place.free is None else f", {_size(place.free)} free"
    found = f"{place.path}{left}"
    remedy = f"free some space, lower `capacity`, or use another folder ({_LOCATION_VARIABLES[name]})"
    if place.free is not None and place.free < need.least:
        return Finding(name, Level.PROBLEM, f"{found}, but one session needs {_size(need.least)}", remedy)
    if place.inodes is not None and place.inodes < need.files:
        message = f"{place.path} has space for {place.inodes} more files, but a run may need {need.files}"
        return Finding(name, Level.WARNING if place.inodes > _SPARE_FILES else Level.PROBLEM, message, remedy)
    if place.free is not None and place.free < need.all:
        return Finding(name, Level.WARNING, f"{found}, but a run may need {_size(need.all)}", remedy)
    return Finding(name, Level.OK, found)


_LOCATION_VARIABLES: Final = {
    "repositories": "COUNCIL_HOME",
    "state": "COUNCIL_STATE",
    "temporary": "TMPDIR",
}


def check_home(home: Path, top: Path) -> Finding | None:
    """Return a problem if the hubs are inside the user's repository, else None."""
    if not home.is_relative_to(top):
        return None
    return Finding(
        "repositories", Level.PROBLEM, f"{home} is inside the repository", "set COUNCIL_HOME to another folder"
    )


def check_file_system(name: str, place: StorageLocation) -> Finding | None:
    """Check the file system of a location; None if it is unknown."""
    if place.file_system is None:
        return None
    found, remedy = (
        f"{place.path} is on {place.mount} ({place.file_system})",
        f"set {_LOCATION_VARIABLES[name]} to a local disk",
    )
    title = f"{name} disk"
    if place.file_system in NETWORK_FILE_SYSTEMS:
        message = f"{found}, a network file system with unreliable locks"
        return Finding(title, Level.PROBLEM, message, remedy)
    if place.file_system in _MEMORY_FILE_SYSTEMS:
        message = f"{found}, which is erased when the machine restarts"
        return Finding(title, Level.WARNING, message, remedy)
    return Finding(title, Level.OK, found)


def check_clock(machine: Machine, places: Sequence[StorageLocation]) -> Finding:
    """Compare the clock with the installation time and the clocks of file systems."""
    remedy = "set the clock, or enable NTP: pauses and certificates depend on it"
    shown = datetime.fromtimestamp(min(max(machine.now, 0.0), _LATEST_CREDIBLE), UTC)
    found = f"{shown:%Y-%m-%d %H:%M:%S} UTC"
    if machine.installed is not None and machine.now < machine.installed - _DAY:
        return Finding("clock", Level.WARNING, f"the clock shows {found}, before this program was installed", remedy)
    if machine.now >= _LATEST_CREDIBLE:
        return Finding("clock", Level.WARNING, f"the clock shows {shown:%Y} or later, which is implausible", remedy)
    wrong = next((place for place in places if abs(place.ahead) > _MAX_CLOCK_SKEW), None)
    if wrong is not None:
        message = f"timestamps on {wrong.path} differ from the local clock by {wrong.ahead:.0f} s"
        return Finding("clock", Level.WARNING, message, "set the clock of the file server")
    return Finding("clock", Level.OK, found)


def plugin_finding(skipped: SkippedPlugin) -> Finding:
    """Return an unusable plugin, or profile of the user, as a finding."""
    if skipped.is_profile:
        return Finding("profile", Level.WARNING, str(skipped), "correct the file, or remove it")
    return Finding("plugin", Level.WARNING, str(skipped), "update it, remove it, or omit its name from COUNCIL_PLUGINS")


def check_project_folder(*, exists: bool, is_ignored: bool) -> Finding:
    """Check that git ignores the `.council` folder of a project."""
    if exists and not is_ignored:
        return Finding(
            ".council",
            Level.WARNING,
            "not ignored by git",
            "add it to .git/info/exclude, or start a run, which adds it",
        )
    return Finding(".council", Level.OK, "ignored by git" if is_ignored else "created by the first run, ignored by git")


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count // MIB} MiB"
