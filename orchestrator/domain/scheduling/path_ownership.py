"""Who owns which paths now: what a session holds, what stands in another's way, what a landing may touch.

A holding is part of a claim: it counts for as long as the claim on its task has the epoch that it names and is not
released. All others are what somebody left behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from orchestrator.domain.documents.times import Instant
from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.scheduling.path_patterns import check_pattern, has_overlap, is_match, literal_prefix
from orchestrator.errors import RefusedError

#: How many paths a session can own in all, and of how many characters: each change writes them all.
MAX_OWNED_PATTERNS, MAX_OWNED_CHARS = 2000, 200_000

#: What no pattern can say, a backslash and bytes that are not UTF-8, is any character there.
_UNSAYABLE: Final = ("\\", *map(chr, range(0xDC80, 0xDD00)))
_SPECIAL: Final = str.maketrans({**{one: f"[{one}]" for one in "*?["}, **dict.fromkeys(_UNSAYABLE, "?")})


@dataclass(frozen=True, slots=True)
class OwnershipWait:
    """What a session would own if somebody else did not; times are wall-clock seconds."""

    patterns: tuple[str, ...]
    since: Instant


@dataclass(frozen=True, slots=True)
class PathOwnership:
    """What one session owns, and waits for."""

    session: SessionName
    patterns: tuple[str, ...]
    since: Instant
    """Wall-clock seconds: when it took the first of what it holds."""
    orchestrator: str
    """The id of the process that took it."""
    epoch: int
    """Of the claim that it is part of."""
    locked: tuple[str, ...] = ()
    """Those of its patterns that the session asked to lock: no work of others that changes them lands."""
    waiting: OwnershipWait | None = None
    taken: Mapping[str, Instant] = field(default_factory=dict)
    """When it took each of its patterns."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to it any more that others have to know."""
        return not self.patterns and self.waiting is None

    def has_conflict_with(self, session: SessionName, patterns: Sequence[str]) -> bool:
        """Whether a session can't own patterns because of what this one owns."""
        return find_ownership_conflict(session, patterns, [self]) is not None

    def with_patterns(self, patterns: Sequence[str], now: float, *, is_lock: bool = False) -> PathOwnership:
        """Return it with more patterns; of those that it has already only the lock is new."""
        new = dict.fromkeys(one for one in patterns if one not in self.taken)
        taken = {**self.taken, **dict.fromkeys(new, now)}
        since = self.since if self.patterns else now
        locked = tuple(dict.fromkeys((*self.locked, *(patterns if is_lock else ()))))
        return replace(self, patterns=tuple(taken), since=since, locked=locked, taken=taken)

    def without(self, patterns: Sequence[str]) -> PathOwnership:
        """Return it without patterns, as they were taken."""
        taken = {one: when for one, when in self.taken.items() if one not in patterns}
        locked = tuple(one for one in self.locked if one in taken)
        since = min(taken.values(), default=self.since)
        return replace(self, patterns=tuple(taken), taken=taken, locked=locked, since=since)

    def without_patterns(self) -> PathOwnership:
        """Return it without all that it owns."""
        return self.without(self.patterns)

    def find_lock(self, paths: Iterable[str]) -> tuple[str, str] | None:
        """Return the first path that one of its locks names or lies beneath, with the lock; None if none does."""
        return next(((path, one) for path in paths for one in self.locked if _is_about(one, path)), None)

    def with_waiting(self, waiting: OwnershipWait | None) -> PathOwnership:
        """Return it with what it waits for."""
        return replace(self, waiting=waiting)

    def to_json(self) -> dict[str, Any]:
        """Return the document that a store keeps of it."""
        waiting = self.waiting and {"patterns": list(self.waiting.patterns), "since": self.waiting.since}
        return {
            **self.session._asdict(),
            "patterns": list(self.patterns),
            "since": self.since,
            "orchestrator": self.orchestrator,
            "epoch": self.epoch,
            "locked": list(self.locked),
            "waiting": waiting,
            "taken": dict(self.taken),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PathOwnership:
        """Return what `delta_to_json` made a document of."""
        waiting = value["waiting"]
        return cls(
            SessionName(value["run"], value["task"], value["attempt"]),
            tuple(value["patterns"]),
            value["since"],
            value["orchestrator"],
            value["epoch"],
            tuple(value["locked"]),
            None if waiting is None else OwnershipWait(tuple(waiting["patterns"]), waiting["since"]),
            value["taken"],
        )


@dataclass(frozen=True, slots=True)
class OwnershipConflict:
    """What stands in the way of a session that wants to own paths."""

    wanted: str
    """The first of the wanted patterns that is not free."""
    holder: SessionName
    pattern: str
    """The holder's pattern that it has a path in common with."""
    since: float
    """Wall-clock seconds: since when the holder owns that."""
    orchestrator: str

    def describe(self) -> str:
        """Return who owns what, in words."""
        held = self.wanted if self.wanted == self.pattern else f"{self.wanted} (as {self.pattern})"
        return f"task {self.holder.task} of run {self.holder.run} owns {held}"


def _is_about(pattern: str, path: str) -> bool:
    return is_match(pattern, path) or literal_prefix(pattern).startswith(f"{path}/")


def is_current(holding: PathOwnership, claim: Mapping[str, Any] | None) -> bool:
    """Whether a holding counts, by the document of the claim on its task."""
    return claim is not None and claim.get("epoch") == holding.epoch and claim.get("released") is None


def find_ownership_conflict(
    session: SessionName, patterns: Sequence[str], holdings: Iterable[PathOwnership]
) -> OwnershipConflict | None:
    """Return the oldest holding that overlaps with what a session wants; its own, and its task's, are in nobody's way.

    `holdings` are those that count.
    """
    found = [
        OwnershipConflict(wanted, one.session, pattern, one.taken.get(pattern, one.since), one.orchestrator)
        for one in holdings
        if one.session[:2] != session[:2]
        for wanted in patterns
        for pattern in one.patterns
        if has_overlap(wanted, pattern)
    ]
    return min(found, key=lambda one: (one.since, patterns.index(one.wanted)), default=None)


def escape_path(path: str) -> str:
    """Return the pattern that names one path, and what lies below it, whatever characters it has."""
    return path.translate(_SPECIAL)


def check_ownership_limit(owned: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise RefusedError where a session that owns patterns can't come to own so many more."""
    all_ = {*owned, *wanted}
    count, length = len(all_), sum(map(len, all_))
    if count > MAX_OWNED_PATTERNS or length > MAX_OWNED_CHARS:
        what = f"that would be {count} paths of {length} characters in all that one session owns"
        raise RefusedError(
            f"{what}, {MAX_OWNED_PATTERNS} of {MAX_OWNED_CHARS} fit", "name the folders that they are in"
        )


def check_patterns(patterns: Sequence[str]) -> list[str]:
    """Return patterns, each once; RefusedError names the first that is none."""
    for one in patterns:
        try:
            check_pattern(one)
        except ValueError as error:
            what, _, remedy = str(error).partition(": ")
            raise RefusedError(f"{one!r} is no path to own: {what}", remedy) from None
    return list(dict.fromkeys(patterns))
