"""Findings of the doctor from facts: each at each of its levels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli.render.findings import finding_lines
from orchestrator.cli.render.text import COLUMNS
from orchestrator.config.load import load_config
from orchestrator.domain.scheduling.admission import DEFAULT_DEMAND, MIB, AvailableResources, SessionDemand
from orchestrator.engine.diagnostics import findings
from orchestrator.engine.diagnostics.facts import (
    Machine,
    RepositorySize,
    StorageLocation,
    inspect_location,
    inspect_machine,
)
from orchestrator.engine.diagnostics.findings import Finding, Level, SpaceNeed
from orchestrator.engine.diagnostics.programs import AdapterStatus, ProgramStatus
from orchestrator.errors import ConfigError, RefusedError
from orchestrator.plugins import PluginInfo, SkippedPlugin, load_plugins
from orchestrator.sessions.sandbox.policy import SandboxKind
from orchestrator.system.resources import remaining_processes

MACHINE = Machine("3.11.2", "Linux", AvailableResources(1024, 10, 8 << 30), None, 1_800_000_000.0, 1_700_000_000.0)
PLACE = StorageLocation(Path("/a/place"), 100 << 30, 1_000_000, Path("/a"), "ext4")
TOOL = ProgramStatus("tool", "/bin/tool", "1.2", supported="<2", is_supported=True, ready=True)
NEED = SpaceNeed(1 << 30, 4 << 30, 10_000)


def assert_finding(finding: Finding | None, level: Level, *words: str) -> None:
    """Assert the level and text of a finding; every problem has a remedy."""
    assert finding is not None
    assert finding.level is level
    assert [word for word in words if word not in f"{finding.message} {finding.remedy}"] == []
    assert finding.remedy is not None or level is Level.OK


def test_findings_are_printed_in_full() -> None:
    """Neither a command nor a list of folders is cut."""
    path, command = "/usr/local/bin:" * 40, f"`sysctl {'kernel.unprivileged_userns_clone=1 ' * 20}`"
    lines = [*finding_lines([Finding("sandbox", Level.PROBLEM, f"PATH is {path}", f"run {command} as root")])]
    assert any(path in line for line in lines)
    assert any(command in line for line in lines)


def test_findings_are_wrapped() -> None:
    """All lines of a finding begin in the same column."""
    lines = [*finding_lines([Finding("sandbox", Level.PROBLEM, "word " * 40, "fix " * 40)])]
    assert lines[0].startswith("problem  sandbox  word ")
    assert max(map(len, lines)) <= COLUMNS
    assert {line[: len("problem  sandbox  ")] for line in lines[1:]} == {" " * len("problem  sandbox  ")}


def test_system_is_rated() -> None:
    """Linux and macOS are fine."""
    assert_finding(findings.check_system(MACHINE), Level.OK, "3.11.2", "Linux")
    assert_finding(findings.check_system(replace(MACHINE, system="Windows")), Level.PROBLEM, "WSL")


@pytest.mark.parametrize(
    ("version", "level"),
    [
        (None, Level.PROBLEM),
        ("2.37.9", Level.PROBLEM),
        ("1.99", Level.PROBLEM),
        ("gibberish", Level.PROBLEM),
        ("2.38.1", Level.WARNING),
        ("2.39.5", Level.OK),
        ("3.0", Level.OK),
    ],
)
def test_git_is_rated(version: str | None, level: Level) -> None:
    """Git must be installed, recent enough, and should be a tested version."""
    assert_finding(findings.check_git(version), level, version or "not on PATH")


def test_file_is_rated(tmp_path: Path) -> None:
    """A valid file, one with mistakes, and none."""
    path = tmp_path / "council.yaml"
    path.write_text("version: 1\nadapters: {a: {use: command, argv: [x]}}\ntasks: [{id: t, prompt: p}]\n")
    assert_finding(
        findings.check_file(path, load_config(path, load_plugins().adapters)), Level.OK, "tasks: 1", "adapters: a"
    )
    path.write_text("version: 2\nadapter: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert_finding(findings.check_file(path, caught.value), Level.PROBLEM, f"{path}:1:1: ", "more", "`adapters:`")
    assert_finding(findings.check_file(None, None), Level.WARNING, "council init")


@pytest.mark.parametrize(
    ("program", "used", "unused", "words"),
    [
        (TOOL, Level.OK, Level.OK, "tool 1.2, ready, /bin/tool"),
        (replace(TOOL, path=None, remedy="get it"), Level.PROBLEM, Level.WARNING, "get it"),
        (replace(TOOL, ready=False, remedy="log in"), Level.PROBLEM, Level.WARNING, "log in"),
        (replace(TOOL, ready=None), Level.OK, Level.OK, "tool 1.2, /bin/tool"),
        (
            replace(TOOL, verified=("1.0", "1.1"), compared="newer"),
            Level.OK,
            Level.OK,
            "tool 1.2, ready, /bin/tool, newer than the verified versions 1.0 and 1.1",
        ),
        (replace(TOOL, verified=("1.3",), compared="older"), Level.OK, Level.OK, "older than the verified version 1.3"),
        (replace(TOOL, is_supported=False), Level.WARNING, Level.WARNING, "<2"),
        (replace(TOOL, version=None, is_supported=None, error="it hung"), Level.WARNING, Level.WARNING, "it hung"),
    ],
)
def test_program_is_rated(program: ProgramStatus, used: Level, unused: Level, words: str) -> None:
    """A missing or logged-out program is a problem only for tasks that use it."""
    for is_used, level in ((True, used), (False, unused)):
        (found,) = findings.check_adapter("a", AdapterStatus([program]), is_used=is_used)
        assert_finding(found, level, words)
        assert found.name == "adapter a"


def test_adapter_is_rated() -> None:
    """An adapter without programs is fine, one that fails is not."""
    assert_finding(findings.check_adapter("a", AdapterStatus([]), is_used=True)[0], Level.OK)
    assert_finding(
        findings.check_adapter("a", AdapterStatus([], "it broke"), is_used=True)[0], Level.PROBLEM, "it broke"
    )


def test_sandbox_is_rated() -> None:
    """The strongest kind is fine; a weaker one names the obstacle; none is a problem."""
    assert_finding(findings.check_sandbox(SandboxKind.BUBBLEWRAP), Level.OK)
    assert_finding(findings.check_sandbox(SandboxKind.LANDLOCK), Level.OK)
    why = RefusedError("no bwrap", "install bubblewrap")
    assert_finding(
        findings.check_sandbox(SandboxKind.LANDLOCK, why), Level.WARNING, "weaker", "no bwrap", "install bubblewrap"
    )
    assert_finding(findings.check_sandbox(SandboxKind.OFF), Level.WARNING, "sandbox: off")
    assert_finding(findings.check_sandbox(why), Level.PROBLEM, "no bwrap", "install bubblewrap")


def test_session_capacity_is_rated() -> None:
    """Enough, enough for some, too little for one; unknown limits are not reported."""
    for limit, level in ((1024, Level.OK), (64, Level.WARNING), (32, Level.PROBLEM), (None, Level.OK)):
        assert_finding(findings.check_descriptors(AvailableResources(limit, 10, None), 4), level)
    for left, level in ((8 << 30, Level.OK), (700 * MIB, Level.WARNING), (100 * MIB, Level.PROBLEM)):
        assert_finding(findings.check_memory(AvailableResources(None, 0, left), 4, DEFAULT_DEMAND), level)
    assert_finding(
        findings.check_memory(AvailableResources(None, 0, 8 << 30), 4, SessionDemand(memory=4 << 30)),
        Level.WARNING,
        "4096 MiB",
    )
    assert_finding(findings.check_memory(AvailableResources(None, 0, None), 4, DEFAULT_DEMAND), Level.OK)
    for many, level in ((None, Level.OK), (10_000, Level.OK), (100, Level.WARNING), (10, Level.PROBLEM)):
        assert_finding(findings.check_processes(many, 4), level)


@pytest.mark.parametrize(
    ("place", "level", "words"),
    [
        (PLACE, Level.OK, "100.0 GiB"),
        (replace(PLACE, free=2 << 30), Level.WARNING, "4.0 GiB"),
        (replace(PLACE, free=512 * MIB), Level.PROBLEM, "512 MiB"),
        (replace(PLACE, inodes=5000), Level.WARNING, "5000"),
        (replace(PLACE, inodes=50), Level.PROBLEM, "50"),
        (replace(PLACE, inodes=None, free=None), Level.OK, "/a/place"),
        (replace(PLACE, error="Read-only file system"), Level.PROBLEM, "Read-only"),
    ],
)
def test_disk_space_is_rated(place: StorageLocation, level: Level, words: str) -> None:
    """The free space is compared with the need of one session and of all."""
    assert_finding(findings.check_space("repositories", place, NEED), level, words)


def test_disk_space_grows_with_repository_and_capacity() -> None:
    """Two checkouts per session, and all objects once."""
    small, large = (findings.hub_need(RepositorySize(10 << 30, 1 << 30, 1000), capacity) for capacity in (1, 10))
    assert large.all - small.all == 18 << 30
    assert (small.least, small.least) == (small.all, large.least)
    assert large.files - small.files == 18_000
    assert findings.state_need(10).all > findings.state_need(1).all


def test_file_systems_are_rated() -> None:
    """A disk is fine, memory is reported, a network is rejected, unknown types pass."""
    assert_finding(findings.check_file_system("state", PLACE), Level.OK, "ext4")
    assert_finding(findings.check_file_system("state", replace(PLACE, file_system="tmpfs")), Level.WARNING, "restarts")
    assert_finding(
        findings.check_file_system("state", replace(PLACE, file_system="nfs4")), Level.PROBLEM, "COUNCIL_STATE"
    )
    assert findings.check_file_system("state", replace(PLACE, file_system=None)) is None


def test_moved_repositories_are_rated() -> None:
    assert findings.check_home(Path("/home/state"), Path("/home/project")) is None
    assert_finding(findings.check_home(Path("/home/project/x"), Path("/home/project")), Level.PROBLEM, "COUNCIL_HOME")


def test_clock_is_rated() -> None:
    """Neither before the installation, nor far in the future, nor away from the disk's clock."""
    assert_finding(findings.check_clock(MACHINE, [PLACE]), Level.OK, "2027-01-15 08:00:00")
    assert_finding(findings.check_clock(replace(MACHINE, now=0.0), []), Level.WARNING, "1970")
    assert_finding(findings.check_clock(replace(MACHINE, now=1e18), []), Level.WARNING, "2100")
    assert_finding(findings.check_clock(MACHINE, [replace(PLACE, ahead=-90.0)]), Level.WARNING, "-90 s")


def test_plugins_and_folder_are_rated() -> None:
    """Reports an omitted plugin, and a `.council` that git would track."""
    assert_finding(
        findings.plugin_finding(SkippedPlugin(PluginInfo("x", "y", "1"), "broken")),
        Level.WARNING,
        "broken",
        "COUNCIL_PLUGINS",
    )
    assert_finding(findings.check_project_folder(exists=True, is_ignored=True), Level.OK)
    assert_finding(findings.check_project_folder(exists=False, is_ignored=False), Level.OK)
    assert_finding(findings.check_project_folder(exists=True, is_ignored=False), Level.WARNING)


def test_diagnosis_changes_nothing(tmp_path: Path) -> None:
    """A missing folder is rated by its parent and not created."""
    found = inspect_location(tmp_path / "not" / "yet")
    assert found.error is None
    assert found.free
    assert abs(found.ahead) < 5
    assert list(tmp_path.iterdir()) == []
    assert inspect_machine().now > 1_600_000_000


def test_unwritable_folder_has_its_reason() -> None:
    """The system's own words."""
    assert inspect_location(Path("/proc/self/council")).error


def test_processes_are_counted_by_cgroups(tmp_path: Path) -> None:
    """The tightest of our cgroups counts; undecodable names are ignored."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    (proc / "7").mkdir()
    (proc / "7" / "status").write_bytes(b"Name:\t\xff\nUid:\t0\t0\nThreads:\t3\n")
    for folder, most, now in (("outer", "100", "40"), ("outer/inner", "max", "40")):
        (cgroups / folder).mkdir(parents=True)
        (cgroups / folder / "pids.max").write_text(most)
        (cgroups / folder / "pids.current").write_text(now)
    left = remaining_processes(proc, cgroups)
    assert left is not None
    assert left <= 60
