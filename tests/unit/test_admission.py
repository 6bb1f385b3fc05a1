"""Session capacity: the admission decision by tables, and the measurements of this machine."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.domain.scheduling.admission import (
    MIB,
    AvailableResources,
    NoSessionFits,
    SessionDemand,
    SessionFit,
    can_start_session,
    fit_sessions,
)
from orchestrator.system.resources import available_memory, read_resources

DEMAND = SessionDemand(descriptors=10, memory=100 * MIB, spare_descriptors=20, spare_memory=50 * MIB)


@pytest.mark.parametrize(
    ("facts", "wanted", "sessions"),
    [
        (AvailableResources(None, 10, None), 64, 64),
        (AvailableResources(1024, 10, 10**12), 8, 8),
        (AvailableResources(70, 10, None), 4, 4),
        (AvailableResources(69, 10, None), 4, 3),
        (AvailableResources(1024, 10, 450 * MIB), 5, 4),
        (AvailableResources(69, 10, 150 * MIB), 4, 1),
    ],
)
def test_capacity_is_limited_by_the_scarcest_resource(facts: AvailableResources, wanted: int, sessions: int) -> None:
    found = fit_sessions(facts, wanted, DEMAND)
    assert isinstance(found, SessionFit)
    assert found.sessions == sessions
    assert (found.limited_by is None) is (sessions == wanted)


def test_limited_capacity_has_a_remedy() -> None:
    found = fit_sessions(AvailableResources(69, 10, None), 4, DEMAND)
    assert found == SessionFit(
        3, "10 of 69 file descriptors are open, enough for 3 of 4 sessions: raise the limit with `ulimit -n`"
    )
    short = fit_sessions(AvailableResources(None, 10, 149 * MIB), 4, DEMAND)
    assert isinstance(short, NoSessionFits)
    assert (
        short.message
        == "not enough resources for a session: 149 MiB of memory available, and each session needs 100 MiB"
    )


@pytest.mark.parametrize(
    ("memory", "running", "may"), [(None, 9, True), (150 * MIB, 9, True), (149 * MIB, 9, False), (0, 0, True)]
)
def test_session_starts_only_with_enough_memory(memory: int | None, running: int, may: bool) -> None:
    """With no session running one starts anyway: waiting would free no memory."""
    assert can_start_session(AvailableResources(64, 60, memory), running, DEMAND) is may


def fake_system(tmp_path: Path, *, available: int, limit: str, used: int, reclaimable: int) -> int | None:
    """Return the resources of a machine described by files."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    inner = cgroups / "slice" / "job"
    (proc / "self").mkdir(parents=True)
    inner.mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {available} kB\n")
    (proc / "self" / "cgroup").write_text("1:name=x:/else\n0::/slice/job\n")
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text(f"{limit}\n")
    (inner.parent / "memory.current").write_text(f"{used}\n")
    (inner.parent / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable}\n")
    return available_memory(proc, cgroups)


@pytest.mark.parametrize(("limit", "expected"), [("max", 4096), ("1000", 1000 - 700 + 200), ("600", 100)])
def test_limit_of_an_outer_cgroup_applies(tmp_path: Path, limit: str, expected: int) -> None:
    """The page cache counts as available memory."""
    assert fake_system(tmp_path, available=4, limit=limit, used=700, reclaimable=200) == expected


def test_unknown_limits_do_not_restrict(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) is None


CHILD = """
import json, resource
from orchestrator.system.resources import raise_descriptor_limit, read_resources
from orchestrator.domain.scheduling.admission import fit_sessions
before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
raised = raise_descriptor_limit()
found = fit_sessions(read_resources(), 64)
print(json.dumps([before, raised, found.sessions, found.limited_by]))
"""


@pytest.mark.parametrize(("flag", "raised"), [("-n", 64), ("-Sn", None)], ids=["hard", "soft"])
def test_descriptor_limit_restricts_sessions(flag: str, raised: int | None) -> None:
    """A low hard limit reduces the capacity and is named as the reason; the soft limit is raised to it."""
    hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 16)
    done = subprocess.run(
        ["sh", "-c", f'ulimit {flag} 64 && exec "$0" -c "$1"', sys.executable, CHILD],
        check=True,
        capture_output=True,
        text=True,
    )
    before, after, sessions, limited_by = json.loads(done.stdout)
    assert (before, after) == (64, raised or hard)
    if raised:
        assert 1 <= sessions <= 6
        assert "ulimit -n" in limited_by
    else:
        assert sessions > 6


def test_resources_of_this_machine_are_measured() -> None:
    before = read_resources()
    assert before.descriptors_open >= 3
    with Path("/dev/null").open() as _:
        assert read_resources().descriptors_open == before.descriptors_open + 1
    if sys.platform == "linux":
        assert before.memory is not None
        assert before.memory > MIB
