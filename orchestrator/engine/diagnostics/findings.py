"""Judge facts about a machine and a repository: fine, a warning, or a problem for a run. Pure."""

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
from orchestrator.repo.git.command import MINIMUM_VERSION, RECOMMENDED_VERSION, is_at_least
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.state.log.mounts import NETWORK_FILE_SYSTEMS

_GIB: Final = 1 << 30
_DAY: Final = 86400.0
#: File systems that lose their content on restart.
_MEMORY_FILE_SYSTEMS: Final = frozenset({"ramfs", "tmpfs"})
#: Processes and threads of a session: its sandbox, its supervisor, a CLI with its threads, a build.
_PROCESSES: Final = 64
#: Bytes of a session's output, both streams together, see `orchestrator.sessions.supervision.capture`.
_OUTPUT: Final = 2 * 17 * MIB
#: Bytes and files to leave free at each location.
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
    """The result of one check, and what to do about it."""

    name: str
    level: Level
    message: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class SpaceNeed:
    """Free bytes that a location needs for one session (`least`) and for a whole run (`all`), and free files."""

    least: int
    all: int
    files: int


def refusal_finding(name: str, error: RefusedError) -> Finding:
    """Return a refusal as a finding."""
    return Finding(name, Level.PROBLEM, error.what, error.remedy)


def judge_system(machine: Machine) -> Finding:
    """Judge Python and the system."""
    found = f"Python {machine.python} on {machine.system}"
    if machine.system not in {"Linux", "Darwin"}:
        return Finding("system", Level.PROBLEM, found, "use Linux or macOS (on Windows: WSL)")
    return Finding("system", Level.OK, found)


def judge_git(version: str | None) -> Finding:
    """Judge the version of git; None: git is not installed."""
    least = ".".join(map(str, MINIMUM_VERSION))
    if version is None:
        return Finding("git", Level.PROBLEM, "git is not on PATH", f"install git {least} or newer")
    if not is_at_least(version, MINIMUM_VERSION):
        return Finding("git", Level.PROBLEM, f"git {version} is too old", f"install git {least} or newer")
    if not is_at_least(version, RECOMMENDED_VERSION):
        wanted = ".".join(map(str, RECOMMENDED_VERSION))
        return Finding(
            "git", Level.WARNING, f"git {version}", f"install git {wanted} or newer: older ones are untested"
        )
    return Finding("git", Level.OK, f"git {version}")


def judge_file(file: Path | None, config: RunConfig | ConfigError | None) -> Finding:
    """Judge the file of a run by its config or its errors; None: there is no file."""
    if isinstance(config, ConfigError):
        first, *others = config.problems
        more = f" (and {len(others)} more: run `council validate`)" if others else ""
        location = f"{first.file}:{first.line}:{first.column}"
        return Finding("file", Level.PROBLEM, f"{location}: {first.what}{more}", first.remedy)
    if config is None:
        return Finding("file", Level.WARNING, "there is no council.yaml here", "write one with `council init`")
    adapters = ", ".join(config.adapters)
    return Finding("file", Level.OK, f"{file}: tasks: {len(config.tasks)}, adapters: {adapters}")


def judge_warning(warning: ConfigWarning) -> Finding:
    """Return a warning of `council validate` as a finding."""
    return Finding("file", Level.WARNING, warning.what, warning.remedy)


def judge_adapter(name: str, status: AdapterStatus, *, is_used: bool) -> list[Finding]:
    """Judge the programs of an adapter; if no task uses it, problems are only warnings."""
    bad = Level.PROBLEM if is_used else Level.WARNING
    title = f"adapter {name}"
    if status.trouble is not None:
        return [Finding(title, bad, status.trouble, "correct its options, or update the plugin that brings it")]
    if not status.programs:
        return [Finding(title, Level.OK, "names no program that could be looked for")]
    return [_judge_program(title, program, bad) for program in status.programs]


def _judge_program(title: str, program: ProgramStatus, bad: Level) -> Finding:
    if program.path is None:
        return Finding(title, bad, f"{program.name} is not on PATH", program.remedy)
    found = describe(program)
    if program.ready is False:
        return Finding(title, bad, found, program.remedy)
    if program.is_supported is False:
        remedy = f"it is made for {program.name} {program.supported}: install such a version if this one does not work"
        return Finding(title, Level.WARNING, found, remedy)
    if program.trouble is not None:
        return Finding(title, Level.WARNING, found, f"try `{program.name}` by hand")
    return Finding(title, Level.OK, found)


def describe(program: ProgramStatus) -> str:
    """Describe a program briefly: version, readiness, path, error."""
    if program.path is None:
        return f"{program.name}: not on PATH"
    readiness = {True: "ready", False: "not ready", None: None}[program.ready]
    parts = (f"{Path(program.name).name} {program.version or ''}".strip(), readiness, program.path, program.trouble)
    return ", ".join(part for part in parts if part)


def judge_sandbox(kind: SandboxKind | RefusedError, weaker_for: RefusedError | None = None) -> Finding:
    """Judge the available sandbox; `weaker_for` says why Landlock was chosen instead of bubblewrap."""
    if isinstance(kind, RefusedError):
        return refusal_finding("sandbox", kind)
    if kind is SandboxKind.OFF:
        found = "off: sessions have access to everything that you have"
        return Finding("sandbox", Level.WARNING, found, "remove `sandbox: off` unless they are sandboxed otherwise")
    if kind is SandboxKind.LANDLOCK and weaker_for is not None:
        found = f"landlock, the weaker sandbox: {weaker_for.what}"
        return Finding("sandbox", Level.WARNING, found, weaker_for.remedy)
    return Finding("sandbox", Level.OK, f"{kind} works")


def judge_descriptors(room: AvailableResources, capacity: int) -> Finding:
    """Judge the limit of open files."""
    limit = "no limit" if room.descriptor_limit is None else f"at most {room.descriptor_limit}"
    return _judge_resource(
        "open files",
        limit,
        AvailableResources(room.descriptor_limit, room.descriptors_open, None),
        capacity,
        SessionDemand(),
    )


def judge_memory(room: AvailableResources, capacity: int, demand: SessionDemand) -> Finding:
    """Judge the memory that is left."""
    if room.memory is None:
        return Finding("memory", Level.OK, "this system does not say how much is left")
    return _judge_resource(
        "memory", f"{_size(room.memory)} are left", AvailableResources(None, 0, room.memory), capacity, demand
    )


def _judge_resource(name: str, found: str, room: AvailableResources, capacity: int, demand: SessionDemand) -> Finding:
    fitting = fit_sessions(room, capacity, demand)
    if not isinstance(fitting, SessionFit):
        return Finding(name, Level.PROBLEM, fitting.what, fitting.remedy)
    if fitting.limited_by is not None:
        what, _, remedy = fitting.limited_by.rpartition(": ")
        return Finding(name, Level.WARNING, what, remedy)
    return Finding(name, Level.OK, f"{found}, enough for {capacity} sessions")


def judge_processes(left: int | None, capacity: int) -> Finding:
    """Judge how many more processes and threads can be started."""
    if left is None:
        return Finding("processes", Level.OK, "no limit is known")
    found = f"{left} more processes and threads are allowed"
    remedy = "raise it with `ulimit -u`, in a container by its runtime's options, or lower `capacity`"
    if left < _PROCESSES:
        return Finding("processes", Level.PROBLEM, f"{found}, too few for a session", remedy)
    if left < _PROCESSES * capacity:
        return Finding("processes", Level.WARNING, f"{found}, a session may need {_PROCESSES}", remedy)
    return Finding("processes", Level.OK, found)


def hub_need(size: RepositorySize | None, capacity: int) -> SpaceNeed:
    """Return the space for a hub: all objects, and two checkouts per session, one of them for its checks."""
    size = size or RepositorySize(0, 0, 0)
    per_session, base = 2 * size.checkout, size.objects + _SPARE
    return SpaceNeed(base + per_session, base + per_session * capacity, 2 * size.files * capacity + _SPARE_FILES)


def state_need(capacity: int) -> SpaceNeed:
    """Return the space for the state and the output of sessions, several outputs per session."""
    return SpaceNeed(_SPARE, _SPARE + 4 * _OUTPUT * capacity, _SPARE_FILES)


TEMPORARY_NEED: Final = SpaceNeed(MIB, _SPARE, 100)


def judge_space(name: str, place: StorageLocation, need: SpaceNeed) -> Finding:
    """Judge whether a location is writable and has enough free space."""
    if place.trouble is not None:
        fix = RESOURCE_MESSAGES.get(place.trouble, "make it writable")
        remedy = f"{fix}, or choose another one ({_LOCATION_VARIABLES[name]})"
        return Finding(name, Level.PROBLEM, f"{place.path} can't be written to: {place.trouble}", remedy)
    left = "" if place.free is None else f", {_size(place.free)} free"
    found = f"{place.path}{left}"
    remedy = f"make room, lower `capacity`, or choose another place ({_LOCATION_VARIABLES[name]})"
    if place.free is not None and place.free < need.least:
        return Finding(name, Level.PROBLEM, f"{found}, and {_size(need.least)} are needed for one session", remedy)
    if place.inodes is not None and place.inodes < need.files:
        what = f"{place.path} has room for {place.inodes} more files, and {need.files} may be needed"
        return Finding(name, Level.WARNING if place.inodes > _SPARE_FILES else Level.PROBLEM, what, remedy)
    if place.free is not None and place.free < need.all:
        return Finding(name, Level.WARNING, f"{found}, and {_size(need.all)} may be needed", remedy)
    return Finding(name, Level.OK, found)


_LOCATION_VARIABLES: Final = {
    "repositories": "COUNCIL_HOME",
    "state": "COUNCIL_STATE",
    "temporary": "TMPDIR",
}


def judge_home(home: Path, top: Path) -> Finding | None:
    """Judge whether the hubs are inside the user's repository; None if not."""
    if not home.is_relative_to(top):
        return None
    return Finding(
        "repositories", Level.PROBLEM, f"{home} is inside the repository", "set COUNCIL_HOME to another folder"
    )


def judge_file_system(name: str, place: StorageLocation) -> Finding | None:
    """Judge the file system of a location; None if it is unknown."""
    if place.file_system is None:
        return None
    found, remedy = (
        f"{place.path} is on {place.mount} ({place.file_system})",
        f"set {_LOCATION_VARIABLES[name]} to a local disk",
    )
    title = f"{name} disk"
    if place.file_system in NETWORK_FILE_SYSTEMS:
        what = f"{found}, a network file system whose locks can't be relied on"
        return Finding(title, Level.PROBLEM, what, remedy)
    if place.file_system in _MEMORY_FILE_SYSTEMS:
        what = f"{found}, which is lost when the machine restarts"
        return Finding(title, Level.WARNING, what, remedy)
    return Finding(title, Level.OK, found)


def judge_clock(machine: Machine, places: Sequence[StorageLocation]) -> Finding:
    """Judge the wall clock against the time of our installation, and against the clocks of file systems."""
    remedy = "set the clock, or let NTP set it: pauses and certificates depend on it"
    told = datetime.fromtimestamp(min(max(machine.now, 0.0), _LATEST_CREDIBLE), UTC)
    found = f"{told:%Y-%m-%d %H:%M:%S} UTC"
    if machine.installed is not None and machine.now < machine.installed - _DAY:
        return Finding("clock", Level.WARNING, f"it says {found}, which is before this program was installed", remedy)
    if machine.now >= _LATEST_CREDIBLE:
        return Finding("clock", Level.WARNING, f"it says {found} or later", remedy)
    wrong = next((place for place in places if abs(place.ahead) > _MAX_CLOCK_SKEW), None)
    if wrong is not None:
        what = f"the time stamps of {wrong.path} differ from it by {wrong.ahead:.0f} s"
        return Finding("clock", Level.WARNING, what, "set the clock of the machine that the disk belongs to")
    return Finding("clock", Level.OK, found)


def judge_plugin(left_out: str) -> Finding:
    """Return an unusable plugin as a finding."""
    return Finding("plugin", Level.WARNING, left_out, "update it, remove it, or leave its name out of COUNCIL_PLUGINS")


def judge_project_folder(*, exists: bool, is_ignored: bool) -> Finding:
    """Judge whether git ignores the `.council` folder of a project."""
    if exists and not is_ignored:
        return Finding(
            ".council", Level.WARNING, "git does not ignore it", "add it to .git/info/exclude; a run does so"
        )
    return Finding(".council", Level.OK, "git ignores it" if is_ignored else "the first run makes it, ignored by git")


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count // MIB} MiB"
