"""Ownership of paths by sessions, and conflicts between owners.

An ownership record is part of a claim: it is current as long as the claim on its task has the same epoch and is not
released. All other records are leftovers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import Field

from orchestrator.domain.documents.stored import StoredDocument
from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.settings.path_patterns import check_pattern, has_overlap, is_match, literal_prefix
from orchestrator.errors import InvalidValue, RefusedError

#: The maximum number of patterns per session and of their characters: each change writes all of them.
MAX_OWNED_PATTERNS, MAX_OWNED_CHARS = 2000, 200_000

#: Characters that patterns can't express, a backslash and bytes that are not UTF-8, become `?`.
_INEXPRESSIBLE: Final = ("\\", *map(chr, range(0xDC80, 0xDD00)))
_SPECIAL: Final = str.maketrans({**{char: f"[{char}]" for char in "*?["}, **dict.fromkeys(_INEXPRESSIBLE, "?")})


@dataclass(frozen=True, slots=True)
class OwnershipWait:
    """Patterns that a session waits for; `since` is wall-clock seconds."""

    patterns: tuple[str, ...]
    since: Instant


class PathOwnership(StoredDocument):
    """The document of the patterns that a session owns, and of those that it waits for."""

    run: str
    task: str
    attempt: int
    patterns: tuple[str, ...]
    since: Instant
    """When it acquired the first of its patterns, in wall-clock seconds."""
    orchestrator: str
    """The id of the orchestrator that acquired them."""
    epoch: int
    """The epoch of the claim on its task."""
    locked: tuple[str, ...] = ()
    """Patterns that the session locked explicitly: no other task may land changes to them."""
    waiting: OwnershipWait | None = None
    taken: dict[str, Instant] = Field(default_factory=dict)
    """When it acquired each of its patterns."""

    @property
    def session(self) -> SessionName:
        """The session that owns the patterns."""
        return SessionName(self.run, self.task, self.attempt)

    @property
    def is_idle(self) -> bool:
        """Whether the session has and awaits no patterns: the record can be deleted."""
        return not self.patterns and self.waiting is None

    def has_conflict_with(self, session: SessionName, patterns: Sequence[str]) -> bool:
        """Return whether these patterns of another session overlap with its own."""
        return find_ownership_conflict(session, patterns, [self]) is not None

    def with_patterns(self, patterns: Sequence[str], now: float, *, is_lock: bool = False) -> PathOwnership:
        """Return the record with more patterns; existing patterns may become locked."""
        new = dict.fromkeys(pattern for pattern in patterns if pattern not in self.taken)
        taken = {**self.taken, **dict.fromkeys(new, now)}
        since = self.since if self.patterns else now
        locked = tuple(dict.fromkeys((*self.locked, *(patterns if is_lock else ()))))
        return self.model_copy(update={"patterns": tuple(taken), "since": since, "locked": locked, "taken": taken})

    def without(self, patterns: Sequence[str]) -> PathOwnership:
        """Return the record without these patterns."""
        taken = {pattern: since for pattern, since in self.taken.items() if pattern not in patterns}
        locked = tuple(pattern for pattern in self.locked if pattern in taken)
        since = min(taken.values(), default=self.since)
        return self.model_copy(update={"patterns": tuple(taken), "taken": taken, "locked": locked, "since": since})

    def without_patterns(self) -> PathOwnership:
        """Return the record without any patterns."""
        return self.without(self.patterns)

    def find_lock(self, paths: Iterable[str]) -> tuple[str, str] | None:
        """Return the first path that matches or contains a lock, with the lock, or None."""
        return next(((path, lock) for path in paths for lock in self.locked if _is_about(lock, path)), None)

    def with_waiting(self, waiting: OwnershipWait | None) -> PathOwnership:
        """Return the record with this wait."""
        return self.model_copy(update={"waiting": waiting})


@dataclass(frozen=True, slots=True)
class OwnershipConflict:
    """A conflict between wanted patterns and an owner."""

    wanted: str
    """The first wanted pattern that is not free."""
    holder: SessionName
    pattern: str
    """The overlapping pattern of the holder."""
    since: float
    """When the holder acquired it, in wall-clock seconds."""
    orchestrator: str

    def describe(self) -> str:
        """Return a description of the owner and the pattern."""
        held = self.wanted if self.wanted == self.pattern else f"{self.wanted} (as {self.pattern})"
        return f"task {self.holder.task} of run {self.holder.run} owns {held}"


def _is_about(pattern: str, path: str) -> bool:
    return is_match(pattern, path) or literal_prefix(pattern).startswith(f"{path}/")


def is_current(holding: PathOwnership, claim: Mapping[str, Any] | None) -> bool:
    """Return whether an ownership record is current by the claim of its task."""
    return claim is not None and claim.get("epoch") == holding.epoch and claim.get("released") is None


def find_ownership_conflict(
    session: SessionName, patterns: Sequence[str], holdings: Iterable[PathOwnership]
) -> OwnershipConflict | None:
    """Return the conflict with the oldest owner of overlapping patterns, or None.

    Records of the session's own task do not conflict. `holdings` are the current records.
    """
    conflicts = [
        OwnershipConflict(
            wanted, holding.session, pattern, holding.taken.get(pattern, holding.since), holding.orchestrator
        )
        for holding in holdings
        if holding.session[:2] != session[:2]
        for wanted in patterns
        for pattern in holding.patterns
        if has_overlap(wanted, pattern)
    ]
    return min(conflicts, key=lambda conflict: (conflict.since, patterns.index(conflict.wanted)), default=None)


def escape_path(path: str) -> str:
    """Return the pattern that matches exactly this path, and all paths below it."""
    return path.translate(_SPECIAL)


def check_ownership_limit(owned: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise RefusedError if a session would own too many patterns."""
    all_ = {*owned, *wanted}
    count, length = len(all_), sum(map(len, all_))
    if count > MAX_OWNED_PATTERNS or length > MAX_OWNED_CHARS:
        message = f"too many owned paths: {count} with {length} characters in total"
        raise RefusedError(
            f"{message} (limits per session: {MAX_OWNED_PATTERNS} and {MAX_OWNED_CHARS})", "use their folders instead"
        )


def check_patterns(patterns: Sequence[str]) -> list[str]:
    """Return distinct patterns; raise RefusedError for the first invalid one."""
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except InvalidValue as error:
            raise RefusedError(f"invalid path pattern {pattern!r}: {error.message}", error.remedy) from None
    return list(dict.fromkeys(patterns))
