"""Findings from the figures of a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.domain.settings.run_settings import Retention
from orchestrator.engine.diagnostics.findings import Level
from orchestrator.engine.diagnostics.state_findings import (
    LARGE_LAG,
    SLOW_COMMIT,
    LogGrowth,
    SilentSession,
    check_documents,
    check_integrity,
    check_interrupted_runs,
    check_latency,
    check_log,
    check_server,
    check_silent_sessions,
)
from orchestrator.protocols import (
    Damage,
    Key,
    PoolStatistics,
    ReplicaStatistics,
    ServerStatistics,
    StoreStatistics,
    VerificationReport,
)

DAY = 86400.0
KEPT = Retention(retention=30 * DAY, max_size=1000)


def figures(first: int = 0, log_bytes: int = 500) -> StoreStatistics:
    """Return the figures of a small store."""
    return StoreStatistics(position=100, first=first, documents=3, bytes=90, log_bytes=log_bytes)


@pytest.mark.parametrize(
    ("found", "growth", "reported"),
    [
        (figures(), LogGrowth(100, DAY, DAY), None),
        (figures(), LogGrowth(0, 0.0, 0.0), None),
        (figures(log_bytes=1001), LogGrowth(100, DAY, DAY), "above its limit"),
        (figures(), LogGrowth(100, 600.0, DAY), "full within an hour"),
        (figures(first=50), LogGrowth(10, DAY, 2 * DAY), "history of 2d instead of 30d"),
        (figures(first=50), LogGrowth(10, DAY, 31 * DAY), None),
        (figures(first=50, log_bytes=100), LogGrowth(10, DAY, 2 * DAY), None),
    ],
)
def test_log_is_rated(found: StoreStatistics, growth: LogGrowth, reported: str | None) -> None:
    """Too large, soon too large, or shorter than configured."""
    one = check_log(found, growth, KEPT)
    assert one.level is (Level.OK if reported is None else Level.WARNING)
    assert reported is None or reported in one.message


def test_log_without_an_age_is_not_too_short() -> None:
    """An unlimited log is rated by its size alone."""
    assert (
        check_log(figures(first=50), LogGrowth(10, DAY, DAY), Retention(retention=None, max_size=1000)).level
        is Level.OK
    )


def test_largest_documents_are_named() -> None:
    """The five largest, and the number of others."""
    large = [(Key("task", str(number)), 2_000_000 - number) for number in range(7)]
    reported = [*check_documents(StoreStatistics(1, 0, 9, 9, 9, (), large))]
    assert [one.name for one in reported] == [*(f"document task/{number}" for number in range(5)), "documents"]
    assert reported[-1].message == "2 more are larger than 1MB"
    assert [one.level for one in check_documents(figures())] == [Level.OK]


def test_latency_is_rated() -> None:
    """A slow commit is a warning; only a store on this machine has a folder to move."""
    assert check_latency(SLOW_COMMIT, is_local=True).level is Level.OK
    slow = [check_latency(2 * SLOW_COMMIT, is_local=is_local) for is_local in (True, False)]
    assert [one.level for one in slow] == [Level.WARNING] * 2
    assert ["state_dir" in str(one.remedy) for one in slow] == [True, False]


@pytest.mark.parametrize(
    ("connections", "problem", "level"),
    [(90, "", Level.OK), (91, "", Level.WARNING), (1, "it evicts data", Level.WARNING)],
)
def test_server_is_rated(connections: int, problem: str, level: Level) -> None:
    """By its problem and its free connections; a store without a server has no finding."""
    server = ServerStatistics("redis 8.0", connections, 100, PoolStatistics(2, 16, 1, 0), (), problem, "change it")
    (found,) = check_server(server)
    assert (found.name, found.level, problem in found.message) == ("server", level, True)
    assert "2 of 16 open, 1 in use, 0 waiting" in found.message
    assert list(check_server(None)) == []


@pytest.mark.parametrize(
    ("replica", "level", "message"),
    [
        (ReplicaStatistics("b", "streaming", True, 0), Level.OK, "synchronous, streaming, 0B behind"),
        (ReplicaStatistics("b", "online", False, 1000, 2.04), Level.OK, "asynchronous, online, 1.0KB behind, 2.0 s"),
        (ReplicaStatistics("b", "online", False, LARGE_LAG + 1), Level.WARNING, "asynchronous, online, 17MB behind"),
        (ReplicaStatistics("b", "hidden", False), Level.OK, "asynchronous, lag unknown"),
    ],
)
def test_replica_is_rated(replica: ReplicaStatistics, level: Level, message: str) -> None:
    """By its lag."""
    _, found = check_server(ServerStatistics("redis 8.0", 1, 100, PoolStatistics(1, 16, 1, 0), (replica,)))
    assert (found.name, found.level, found.message) == ("replica b", level, message)


def test_integrity_is_rated() -> None:
    """Damage is a problem, and so is a difference between documents and log."""
    assert [one.level for one in check_integrity(VerificationReport(3, 10))] == [Level.OK]
    damage = Damage(Path("1.jsonl"), 7, (Key("task", "a"),), "commit 2 is damaged")
    (reported,) = check_integrity(VerificationReport(3, 10, [damage], [Key("task", "a")]))
    assert reported.level is Level.PROBLEM
    assert "1.jsonl, byte 7" in reported.message
    assert "older versions after damage: task/a" in reported.message
    assert [one.name for one in check_integrity(VerificationReport(3, 10, (), (), [Key("task", "b")]))] == [
        "integrity",
        "memory",
    ]


def test_idle_sessions_are_rated() -> None:
    """Longer than the limit, if there is one."""
    sessions = [
        SilentSession("r", "a", 700.0, 600.0),
        SilentSession("r", "b", 700.0, None),
        SilentSession("r", "c", 1.0, 600.0),
    ]
    assert [(one.name, one.level) for one in check_silent_sessions(sessions)] == [
        ("sessions", Level.OK),
        ("session r/a", Level.WARNING),
    ]


def test_interrupted_runs_are_rated() -> None:
    """With the command to resume the first."""
    healthy = check_interrupted_runs([])
    assert (healthy.level, healthy.message) == (Level.OK, "no interrupted runs")
    reported = check_interrupted_runs(["r1", "r2"])
    assert reported.message == "interrupted: r1, r2"
    assert reported.remedy == "`council resume r1`"
