"""Check the health of a store and of its runs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.domain.settings.quantities import format_duration, format_size_short
from orchestrator.domain.settings.run_settings import Retention
from orchestrator.domain.wording import join_names
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.protocols import Key, ReplicaStatistics, ServerStatistics, StoreStatistics, VerificationReport

#: The duration in seconds above which a commit is slow: each status change of a task takes three or four commits.
SLOW_COMMIT: Final = 0.5
#: The minimum time in seconds until the log may reach its size limit.
_MIN_LOG_LIFETIME: Final = 3600.0
_MOST_NAMED: Final = 5
#: The share of a server's connections above which few are free.
_MANY_CONNECTIONS: Final = 0.9
#: The bytes of log above which a replica is too far behind: a file of PostgreSQL's log.
LARGE_LAG: Final = 16 << 20
_REPAIR: Final = "run `council state verify --repair` to keep the readable part"


@dataclass(frozen=True, slots=True)
class LogGrowth:
    """Commits to the log during `seconds`, and the age of the oldest readable state."""

    commits: int
    seconds: float
    history_seconds: float
    """The age of the oldest state that can be reconstructed."""


@dataclass(frozen=True, slots=True)
class SilentSession:
    """A running session, and the seconds since its last output.

    If `limit` is None, there is no limit.
    """

    run: str
    task: str
    seconds: float
    limit: float | None


def check_documents(found: StoreStatistics) -> Iterator[Finding]:
    """Yield findings about the size of documents, with the largest ones."""
    if not found.large:
        yield Finding("documents", Level.OK, f"{found.documents}, {format_size_short(found.bytes)}")
    for key, size in found.large[:_MOST_NAMED]:
        remedy = "give the task a shorter prompt, or fewer attempts: each change rewrites the whole document"
        yield Finding(f"document {key}", Level.WARNING, f"{format_size_short(size)}, more than 1MB", remedy)
    if len(found.large) > _MOST_NAMED:
        yield Finding("documents", Level.WARNING, f"{len(found.large) - _MOST_NAMED} more are larger than 1MB")


def check_expired(found: StoreStatistics) -> Finding:
    """Check for expired documents that are not deleted yet."""
    if not found.expired:
        return Finding("expired", Level.OK, "nothing")
    remedy = "an active run deletes them within 30 s, `council state compact` immediately"
    return Finding("expired", Level.WARNING, _list_keys(found.expired), remedy)


def check_log(found: StoreStatistics, growth: LogGrowth, retention: Retention) -> Finding:
    """Check the size, growth and retention of the log."""
    message = (
        f"{format_size_short(found.log_bytes)} of {format_size_short(retention.max_size)}, {found.position:,} commits"
    )
    if growth.seconds > 0:
        message += f", {growth.commits / growth.seconds * 60:,.0f} per minute recently"
    commits = found.position - found.first
    per_second = growth.commits / growth.seconds * found.log_bytes / commits if growth.seconds > 0 and commits else 0.0
    more = "raise `max_size` under `state`"
    if found.log_bytes > retention.max_size:
        remedy = f"{more}, or prune old history with `council state compact`"
        return Finding("log", Level.WARNING, f"{message}: above its limit", remedy)
    if per_second * _MIN_LOG_LIFETIME > retention.max_size:
        return Finding(
            "log", Level.WARNING, f"{message}: full within an hour", f"find the cause of the commits, or {more}"
        )
    wanted = retention.retention
    if found.first and wanted is not None and growth.history_seconds < wanted:
        short = f"history of {format_duration(round(growth.history_seconds))} instead of {format_duration(wanted)}"
        if found.log_bytes < retention.max_size / 2:  # imported, repaired or compacted manually
            return Finding("log", Level.OK, f"{message}: {short}, but not because of its size")
        return Finding("log", Level.WARNING, f"{message}: {short}", f"{more}, or lower `retention`")
    return Finding("log", Level.OK, message)


def check_server(found: ServerStatistics | None) -> Iterator[Finding]:
    """Yield findings about the store's server, if it has one, and about its replicas."""
    if found is None:
        return
    pool = found.pool
    what = (
        f"{found.version}, {found.connections} of {found.max_connections} connections, pool of this process: "
        f"{pool.size} of {pool.max_size} open, {pool.in_use} in use, {pool.waiting} waiting"
    )
    if found.problem:
        yield Finding("server", Level.WARNING, f"{what}: {found.problem}", found.remedy)
    elif found.connections > found.max_connections * _MANY_CONNECTIONS:
        yield Finding("server", Level.WARNING, f"{what}: few free connections", "raise the limit in its configuration")
    else:
        yield Finding("server", Level.OK, what)
    for one in found.replicas:
        yield _check_replica(one)


def _check_replica(found: ReplicaStatistics) -> Finding:
    title, kind = f"replica {found.name}", "synchronous" if found.is_synchronous else "asynchronous"
    if found.lag_bytes is None:
        return Finding(title, Level.OK, f"{kind}, lag unknown", "`GRANT pg_monitor` to the user, to see it")
    seconds = "" if found.lag_seconds is None else f", {found.lag_seconds:.1f} s"
    what = f"{kind}, {found.state}, {format_size_short(found.lag_bytes)} behind{seconds}"
    if found.lag_bytes > LARGE_LAG:
        return Finding(title, Level.WARNING, what, "check the replica's disk and its network")
    return Finding(title, Level.OK, what)


def check_latency(commit: float, read: float | None = None, *, is_local: bool) -> Finding:
    """Check the seconds that a durable commit took, and report those of a read.

    `is_local`: the store is in a folder of this machine.
    """
    found = f"a durable commit took {commit * 1000:,.0f} ms"
    if read is not None:
        found += f", a read {read * 1000:,.1f} ms"
    if commit > SLOW_COMMIT:
        remedy = (
            "find the processes that keep the disk busy, or move `state_dir`"
            if is_local
            else "check the network, and the disk, load and replicas of the server"
        )
        return Finding("latency", Level.WARNING, found, remedy)
    return Finding("latency", Level.OK, found)


def check_integrity(found: VerificationReport) -> Iterator[Finding]:
    """Yield findings about the verification of all records."""
    if found.damage or found.damaged:
        older = f"older versions after damage: {_list_keys(found.damaged)}" if found.damaged else ""
        places = "; ".join(filter(None, [*(place.describe() for place in found.damage[:_MOST_NAMED]), older]))
        yield Finding("integrity", Level.PROBLEM, places, _REPAIR)
    else:
        yield Finding("integrity", Level.OK, f"{found.position:,} commits, {format_size_short(found.bytes)}: intact")
    for key, flaw in list(found.unreadable.items())[:_MOST_NAMED]:
        remedy = "`council state verify --repair` restores its last readable version"
        yield Finding(f"document {key}", Level.PROBLEM, f"unreadable: {flaw}", remedy)
    if len(found.unreadable) > _MOST_NAMED:
        yield Finding("documents", Level.PROBLEM, f"{len(found.unreadable) - _MOST_NAMED} more are unreadable", _REPAIR)
    if found.mismatched:
        remedy = "restart all processes that have this state open; the log is authoritative"
        yield Finding("memory", Level.PROBLEM, f"differs from the log: {_list_keys(found.mismatched)}", remedy)


def check_silent_sessions(sessions: Sequence[SilentSession]) -> Iterator[Finding]:
    """Yield findings about running sessions without recent output."""
    yield Finding("sessions", Level.OK, f"{len(sessions) or 'none'} running")
    for one in sessions:
        if one.limit is not None and one.seconds > one.limit:
            long, limit = format_duration(round(one.seconds)), format_duration(one.limit)
            remedy = f"see `council logs {one.task}`; a session that changes no files either is stopped at the limit"
            title = f"session {one.run}/{one.task}"
            yield Finding(title, Level.WARNING, f"no output for {long} (limit: {limit})", remedy)


def check_interrupted_runs(runs: Sequence[str]) -> Finding:
    """Check for runs with unfinished tasks and no active process."""
    if not runs:
        return Finding("runs", Level.OK, "no interrupted runs")
    return Finding("runs", Level.WARNING, f"interrupted: {', '.join(runs)}", f"`council resume {runs[0]}`")


def check_conflicts(waiting: int) -> Finding:
    """Check for conflicts that need a manual resolution."""
    if not waiting:
        return Finding("conflicts", Level.OK, "no open conflicts")
    return Finding("conflicts", Level.WARNING, f"{waiting} unresolved", "list them with `council state conflicts`")


def _list_keys(keys: Sequence[Key]) -> str:
    return join_names(list(map(str, keys)), _MOST_NAMED)
