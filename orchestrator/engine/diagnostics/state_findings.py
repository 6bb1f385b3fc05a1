"""What is to be thought of a store and of the runs in it, from facts alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.config.model import Retention
from orchestrator.config.source.quantities import format_duration, format_size_short
from orchestrator.engine.diagnostics.findings import Finding, Level
from orchestrator.protocols import Key, StoreStatistics, VerificationReport

#: Seconds of a commit that are too many: a task's change of state takes three or four.
SLOW_COMMIT: Final = 0.5
#: How long a log lasts at least before it is as large as it may be, in seconds.
_MIN_LOG_LIFETIME: Final = 3600.0
_MOST_NAMED: Final = 5
_REPAIR: Final = "`council state verify --repair` restores the readable state"


@dataclass(frozen=True, slots=True)
class LogGrowth:
    """How the log has grown of late: so many commits in so many seconds, and the age of the oldest that is whole."""

    commits: int
    seconds: float
    history_seconds: float
    """Seconds from the oldest state that can be told until now."""


@dataclass(frozen=True, slots=True)
class SilentSession:
    """A session at work that has printed nothing for so many seconds; None as its limit stands for none."""

    run: str
    task: str
    seconds: float
    limit: float | None


def judge_documents(found: StoreStatistics) -> Iterator[Finding]:
    """Judge the sizes of documents: the largest are named."""
    if not found.large:
        yield Finding("documents", Level.OK, f"{found.documents}, {format_size_short(found.bytes)}")
    for key, size in found.large[:_MOST_NAMED]:
        remedy = "give the task a shorter prompt, or fewer attempts: each change is written as a whole"
        yield Finding(f"document {key}", Level.WARNING, f"{format_size_short(size)}, more than 1MB", remedy)
    if len(found.large) > _MOST_NAMED:
        yield Finding("documents", Level.WARNING, f"{len(found.large) - _MOST_NAMED} more are larger than 1MB")


def judge_expired(found: StoreStatistics) -> Finding:
    """Judge what has expired and is not swept."""
    if not found.expired:
        return Finding("expired", Level.OK, "nothing")
    remedy = "a run at work deletes them within 30 s, `council state compact` at once"
    return Finding("expired", Level.WARNING, _named(found.expired), remedy)


def judge_log(found: StoreStatistics, growth: LogGrowth, retention: Retention) -> Finding:
    """Judge the size of the log, how fast it grows, and how far it goes back."""
    what = f"{format_size_short(found.log_bytes)} of {format_size_short(retention.size)}, {found.position:,} commits"
    if growth.seconds > 0:
        what += f", {growth.commits / growth.seconds * 60:,.0f} a minute of late"
    kept = found.position - found.first
    per_second = growth.commits / growth.seconds * found.log_bytes / kept if growth.seconds > 0 and kept else 0.0
    more = "raise `max_size` under `state`"
    if found.log_bytes > retention.size:
        remedy = f"{more}, or let go of what is old by `council state compact`"
        return Finding("log", Level.WARNING, f"{what}: more than it may be", remedy)
    if per_second * _MIN_LOG_LIFETIME > retention.size:
        return Finding("log", Level.WARNING, f"{what}: within an hour it is full", f"look who commits, or {more}")
    wanted = retention.age
    if found.first and wanted is not None and growth.history_seconds < wanted:
        short = f"it goes back {format_duration(round(growth.history_seconds))}, not {format_duration(wanted)}"
        if found.log_bytes < retention.size / 2:  # it was imported, repaired or compacted by hand
            return Finding("log", Level.OK, f"{what}: {short}, for another reason than its size")
        return Finding("log", Level.WARNING, f"{what}: {short}", f"{more}, or lower `retention`")
    return Finding("log", Level.OK, what)


def judge_latency(seconds: float) -> Finding:
    """Judge how long a durable commit took."""
    found = f"a durable commit took {seconds * 1000:,.0f} ms"
    if seconds > SLOW_COMMIT:
        return Finding("latency", Level.WARNING, found, "see what keeps the disk busy, or move the state (`state_dir`)")
    return Finding("latency", Level.OK, found)


def judge_integrity(found: VerificationReport) -> Iterator[Finding]:
    """Judge what a look at all that is recorded has found."""
    if found.damage or found.damaged:
        older = f"older than they were: {_named(found.damaged)}" if found.damaged else ""
        places = "; ".join(filter(None, [*(place.describe() for place in found.damage[:_MOST_NAMED]), older]))
        yield Finding("integrity", Level.PROBLEM, places, _REPAIR)
    else:
        yield Finding("integrity", Level.OK, f"{found.position:,} commits, {format_size_short(found.bytes)}: sound")
    for key, flaw in list(found.unreadable.items())[:_MOST_NAMED]:
        remedy = "`council state verify --repair` restores its last readable version"
        yield Finding(f"document {key}", Level.PROBLEM, f"it can't be read: {flaw}", remedy)
    if len(found.unreadable) > _MOST_NAMED:
        yield Finding("documents", Level.PROBLEM, f"{len(found.unreadable) - _MOST_NAMED} more can't be read", _REPAIR)
    if found.mismatched:
        remedy = "restart whatever has this state open; the log counts"
        yield Finding("memory", Level.PROBLEM, f"told otherwise than the log says: {_named(found.mismatched)}", remedy)


def judge_silent_sessions(sessions: Sequence[SilentSession]) -> Iterator[Finding]:
    """Judge the sessions at work by how long they have printed nothing."""
    yield Finding("sessions", Level.OK, f"{len(sessions) or 'none'} at work")
    for one in sessions:
        if one.limit is not None and one.seconds > one.limit:
            long, limit = format_duration(round(one.seconds)), format_duration(one.limit)
            remedy = f"see `council logs {one.task}`; one that changes no file either is stopped soon"
            title = f"session {one.run}/{one.task}"
            yield Finding(title, Level.WARNING, f"nothing printed for {long}, the limit is {limit}", remedy)


def judge_interrupted_runs(runs: Sequence[str]) -> Finding:
    """Judge the runs that are not over and that nobody is at work in."""
    if not runs:
        return Finding("runs", Level.OK, "none is unfinished")
    return Finding("runs", Level.WARNING, f"interrupted or halted: {', '.join(runs)}", f"`council resume {runs[0]}`")


def judge_conflicts(waiting: int) -> Finding:
    """Judge how many conflicts wait for a person."""
    if not waiting:
        return Finding("conflicts", Level.OK, "none waits")
    return Finding("conflicts", Level.WARNING, f"{waiting} wait for you", "`council state conflicts` lists them")


def _named(keys: Sequence[Key]) -> str:
    more = f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else ""
    return ", ".join(map(str, keys[:_MOST_NAMED])) + more
