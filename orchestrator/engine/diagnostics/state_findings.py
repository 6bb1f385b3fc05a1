"""Judge the health of a store and of its runs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.domain.settings.quantities import format_duration, format_size_short
from orchestrator.domain.settings.run_settings import Retention
from orchestrator.domain.wording import join_names
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.protocols import Key, StoreStatistics, VerificationReport

#: Seconds from which a commit is slow: each status change of a task takes three or four commits.
SLOW_COMMIT: Final = 0.5
#: Least seconds until a log may reach its largest size.
_MIN_LOG_LIFETIME: Final = 3600.0
_MOST_NAMED: Final = 5
_REPAIR: Final = "run `council state verify --repair` to keep what is readable"


@dataclass(frozen=True, slots=True)
class LogGrowth:
    """The recent growth of the log: commits in some seconds, and the age of the oldest readable state."""

    commits: int
    seconds: float
    history_seconds: float
    """The age of the oldest state that can be reconstructed."""


@dataclass(frozen=True, slots=True)
class SilentSession:
    """A running session without output for some seconds; `limit` None: unlimited."""

    run: str
    task: str
    seconds: float
    limit: float | None


def judge_documents(found: StoreStatistics) -> Iterator[Finding]:
    """Judge the sizes of documents, and name the largest."""
    if not found.large:
        yield Finding("documents", Level.OK, f"{found.documents}, {format_size_short(found.bytes)}")
    for key, size in found.large[:_MOST_NAMED]:
        remedy = "give the task a shorter prompt, or fewer attempts: each change rewrites the whole document"
        yield Finding(f"document {key}", Level.WARNING, f"{format_size_short(size)}, more than 1MB", remedy)
    if len(found.large) > _MOST_NAMED:
        yield Finding("documents", Level.WARNING, f"{len(found.large) - _MOST_NAMED} more are larger than 1MB")


def judge_expired(found: StoreStatistics) -> Finding:
    """Judge expired documents that are not deleted yet."""
    if not found.expired:
        return Finding("expired", Level.OK, "nothing")
    remedy = "an active run deletes them within 30 s, `council state compact` at once"
    return Finding("expired", Level.WARNING, _list_keys(found.expired), remedy)


def judge_log(found: StoreStatistics, growth: LogGrowth, retention: Retention) -> Finding:
    """Judge the size of the log, how fast it grows, and how far it goes back."""
    what = (
        f"{format_size_short(found.log_bytes)} of {format_size_short(retention.max_size)}, {found.position:,} commits"
    )
    if growth.seconds > 0:
        what += f", {growth.commits / growth.seconds * 60:,.0f} per minute recently"
    commits = found.position - found.first
    per_second = growth.commits / growth.seconds * found.log_bytes / commits if growth.seconds > 0 and commits else 0.0
    more = "raise `max_size` under `state`"
    if found.log_bytes > retention.max_size:
        remedy = f"{more}, or prune old history with `council state compact`"
        return Finding("log", Level.WARNING, f"{what}: above its limit", remedy)
    if per_second * _MIN_LOG_LIFETIME > retention.max_size:
        return Finding("log", Level.WARNING, f"{what}: full within an hour", f"find out what commits, or {more}")
    wanted = retention.retention
    if found.first and wanted is not None and growth.history_seconds < wanted:
        short = f"it goes back {format_duration(round(growth.history_seconds))}, not {format_duration(wanted)}"
        if found.log_bytes < retention.max_size / 2:  # imported, repaired or compacted manually
            return Finding("log", Level.OK, f"{what}: {short}, but not because of its size")
        return Finding("log", Level.WARNING, f"{what}: {short}", f"{more}, or lower `retention`")
    return Finding("log", Level.OK, what)


def judge_latency(seconds: float) -> Finding:
    """Judge the duration of a durable commit."""
    found = f"a durable commit took {seconds * 1000:,.0f} ms"
    if seconds > SLOW_COMMIT:
        return Finding("latency", Level.WARNING, found, "find out what keeps the disk busy, or move `state_dir`")
    return Finding("latency", Level.OK, found)


def judge_integrity(found: VerificationReport) -> Iterator[Finding]:
    """Judge the verification of all records."""
    if found.damage or found.damaged:
        older = f"older than they were: {_list_keys(found.damaged)}" if found.damaged else ""
        places = "; ".join(filter(None, [*(place.describe() for place in found.damage[:_MOST_NAMED]), older]))
        yield Finding("integrity", Level.PROBLEM, places, _REPAIR)
    else:
        yield Finding("integrity", Level.OK, f"{found.position:,} commits, {format_size_short(found.bytes)}: intact")
    for key, flaw in list(found.unreadable.items())[:_MOST_NAMED]:
        remedy = "`council state verify --repair` restores its last readable version"
        yield Finding(f"document {key}", Level.PROBLEM, f"it can't be read: {flaw}", remedy)
    if len(found.unreadable) > _MOST_NAMED:
        yield Finding("documents", Level.PROBLEM, f"{len(found.unreadable) - _MOST_NAMED} more can't be read", _REPAIR)
    if found.mismatched:
        remedy = "restart every process that has this state open; the log is authoritative"
        yield Finding("memory", Level.PROBLEM, f"differs from the log: {_list_keys(found.mismatched)}", remedy)


def judge_silent_sessions(sessions: Sequence[SilentSession]) -> Iterator[Finding]:
    """Judge the running sessions by how long they have printed nothing."""
    yield Finding("sessions", Level.OK, f"{len(sessions) or 'none'} running")
    for one in sessions:
        if one.limit is not None and one.seconds > one.limit:
            long, limit = format_duration(round(one.seconds)), format_duration(one.limit)
            remedy = f"see `council logs {one.task}`; one that changes no file either is stopped soon"
            title = f"session {one.run}/{one.task}"
            yield Finding(title, Level.WARNING, f"nothing printed for {long}, the limit is {limit}", remedy)


def judge_unfinished_runs(runs: Sequence[str]) -> Finding:
    """Judge the runs with unfinished tasks and no active process."""
    if not runs:
        return Finding("runs", Level.OK, "none is unfinished")
    return Finding("runs", Level.WARNING, f"unfinished: {', '.join(runs)}", f"`council resume {runs[0]}`")


def judge_conflicts(waiting: int) -> Finding:
    """Judge the number of conflicts to be settled manually."""
    if not waiting:
        return Finding("conflicts", Level.OK, "none waiting")
    return Finding("conflicts", Level.WARNING, f"{waiting} waiting for you", "`council state conflicts` lists them")


def _list_keys(keys: Sequence[Key]) -> str:
    return join_names(list(map(str, keys)), _MOST_NAMED)
