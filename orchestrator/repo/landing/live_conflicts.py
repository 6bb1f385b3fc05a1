"""Find the merge conflicts between the unfinished work of running sessions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, count
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.sessions.predicted_conflicts import ChangedPaths
from orchestrator.repo.git.command import Git
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.intake.live_files import FileState, LiveFiles
from orchestrator.repo.landing.trial_merges import TrialMerges
from orchestrator.repo.worktrees.checkouts import HeldSlot

#: The share of the user's inotify watches that we use at most: editors need them too.
_WATCH_SHARE: Final = 0.75
_MAX_WATCHES: Final = Path("/proc/sys/fs/inotify/max_user_watches")

#: Two sessions; the lesser name is the first.
SessionPair = tuple[SessionName, SessionName]


@dataclass(slots=True)
class _Followed:
    """A session: its files while it runs, its base, and the commit of its changes so far."""

    files: LiveFiles | None
    base: str
    commit: str
    earlier: frozenset[str]
    """The paths that earlier sessions of its task changed since the base."""
    changed: ChangedPaths = field(init=False)

    def __post_init__(self) -> None:
        self.update()

    def update(self) -> None:
        """Read the changed paths again."""
        present = frozenset() if self.files is None else frozenset(self.files.present)
        removed = frozenset() if self.files is None else frozenset(self.files.removed)
        self.changed = ChangedPaths((present | self.earlier) - removed, removed)

    def close(self) -> None:
        """Stop following the files. Blocks briefly."""
        if self.files is not None:
            self.files.close()
            self.files = None


class LiveConflicts:
    """The conflicts between sessions whose files it follows; call `close` when done."""

    def __init__(self, git: Git, trials: TrialMerges, conflicts: dict[SessionPair, frozenset[str]]) -> None:
        """Update `conflicts`, the known conflicting paths of each pair, at each look.

        `git` runs in the trusted repository.
        """
        self._git, self._trials, self.conflicts = git, trials, conflicts
        self._sessions: dict[SessionName, _Followed] = {}
        self._new: set[SessionName] = set()
        self._numbers = count()

    @property
    def sessions(self) -> Collection[SessionName]:
        """The followed sessions."""
        return self._sessions.keys()

    async def follow(
        self, name: SessionName, held: HeldSlot, rules: IntakeRules, base: str, start: str | None = None
    ) -> None:
        """Follow the files of a session, whose checkout starts at the commit `start` and lands on `base`."""
        earlier = [] if start is None else await self._git.changes(base, start)
        excludes = self._trials.folder / f"ignored-{next(self._numbers)}"
        is_watched = await anyio.to_thread.run_sync(self._may_watch, len(held.contents.snapshot.folders))
        follow = partial(LiveFiles, self._trials.git, held, rules, excludes, is_watched=is_watched)
        files, paths = await anyio.to_thread.run_sync(follow), frozenset(change.path for change in earlier)
        self._sessions[name] = _Followed(files, base, start or base, paths)
        self._new.add(name)

    def freeze(self, name: SessionName) -> None:
        """Keep the known changes of a session that has ended. Blocks briefly."""
        self._sessions[name].close()

    async def follow_commit(self, name: SessionName, base: str, commit: str) -> None:
        """Compare the built work of a session that has ended, which lands on `base`, instead of its files."""
        known = self._sessions.get(name)
        if known is not None and known.commit == commit:
            return
        if known is not None:
            known.close()
        paths = frozenset(change.path for change in await self._git.changes(base, commit))
        self._sessions[name] = _Followed(None, base, commit, paths)
        self._new.add(name)

    def _may_watch(self, folders: int) -> bool:
        used = sum(one.files.watches for one in self._sessions.values() if one.files is not None)
        try:
            return used + folders <= int(_MAX_WATCHES.read_text()) * _WATCH_SHARE
        except (OSError, ValueError):  # no inotify
            return False

    def forget(self, name: SessionName) -> None:
        """Stop following a session, and forget its conflicts. Blocks briefly."""
        if (one := self._sessions.pop(name, None)) is not None:
            one.close()
        self._new.discard(name)
        for pair in [pair for pair in self.conflicts if name in pair]:
            del self.conflicts[pair]

    def close(self) -> None:
        """Stop following all sessions. Blocks briefly."""
        for one in self._sessions.values():
            one.close()
        self._sessions.clear()

    async def look(self) -> Mapping[SessionPair, frozenset[str]]:
        """Return the pairs with other conflicting paths than before; their paths are empty if they merge cleanly.

        Raises GitError or OSError if git fails.
        """
        changed = await self._commit_changes() | self._new
        self._new.clear()
        pairs = [
            pair
            for pair in combinations(sorted(self._sessions), 2)
            if not changed.isdisjoint(pair) and (pair in self.conflicts or self._may_conflict(*pair))
        ]
        found = dict(zip(pairs, await self._merge(pairs), strict=True))
        news = {pair: paths for pair, paths in found.items() if paths != self.conflicts.get(pair, frozenset())}
        for pair, paths in news.items():
            if paths:
                self.conflicts[pair] = paths
            else:
                del self.conflicts[pair]
        return news

    def _may_conflict(self, one: SessionName, other: SessionName) -> bool:
        return self._sessions[one].changed.may_conflict(self._sessions[other].changed)

    async def _commit_changes(self) -> set[SessionName]:
        """Commit the new changes of all sessions; return the sessions that have any."""
        found: dict[SessionName, Sequence[FileState]] = {}
        for name, one in self._sessions.items():
            if one.files is not None and (files := await one.files.read_changes()):
                found[name] = files
                one.update()
        if found:
            commits = await self._trials.commit([(self._sessions[name].commit, each) for name, each in found.items()])
            for name, commit in zip(found, commits, strict=True):
                self._sessions[name].commit = commit
        return set(found)

    async def _merge(self, pairs: Sequence[SessionPair]) -> list[frozenset[str]]:
        """Return the conflicting paths of each pair; empty if its merge is clean.

        If the sessions started from different commits of the target, conflicts of one session with the target's own
        changes in between do not count.
        """
        sides = [(self._sessions[one], self._sessions[other]) for one, other in pairs]
        wanted: list[tuple[str, str]] = []
        for one, other in sides:
            wanted.append((one.commit, other.commit))
            wanted += [] if one.base == other.base else [(one.commit, other.base), (one.base, other.commit)]
        merges = iter(await self._trials.merge(wanted) if wanted else ())
        found = []
        for one, other in sides:
            both = one.changed.files & other.changed.files
            merged = next(merges)
            # Some conflicts, such as those of renamed folders, have no files.
            paths = frozenset() if merged is None else frozenset(merged or both)
            if one.base != other.base:
                foreign = {path for _ in range(2) for path in next(merges) or ()}
                paths -= foreign - both
            found.append(paths)
        return found
