"""Find the merge conflicts between the unfinished work of running sessions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, combinations, count
from pathlib import Path
from typing import Final

import anyio.to_thread

from orchestrator.domain.runs.session_names import SessionName
from orchestrator.domain.sessions.predicted_conflicts import ChangedPaths
from orchestrator.repo.git.command import MISSING_MODE, Git, split_nul
from orchestrator.repo.intake.inspection import IntakeRules
from orchestrator.repo.intake.live_files import FileState, LiveFiles
from orchestrator.repo.landing.trial_merges import TrialCommit, TrialMerges
from orchestrator.repo.worktrees.checkouts import HeldSlot

#: The share of the user's inotify watches that we use at most: editors need them too.
_WATCH_SHARE: Final = 0.75
_MAX_WATCHES: Final = Path("/proc/sys/fs/inotify/max_user_watches")
#: The content of a session's changes that waits in memory for a merge, in bytes.
_MAX_PENDING: Final = 1 << 20

#: Two sessions; the lesser name is the first.
SessionPair = tuple[SessionName, SessionName]


@dataclass(slots=True)
class _Followed:
    """A session: its files while it runs, its base, and the commit of its changes so far."""

    number: int
    files: LiveFiles | None
    base: str
    commit: TrialCommit
    earlier: ChangedPaths
    """The paths that earlier sessions of its task changed since the base."""
    changed: ChangedPaths = field(init=False)
    """All paths that the task changed since the base."""
    causes: ChangedPaths | None = field(init=False)
    """The changes since the last look that may have caused or resolved conflicts; None without changes."""
    pending: dict[str, FileState] = field(default_factory=dict)
    """The changes that are not yet in `commit`."""

    def __post_init__(self) -> None:
        self.changed = self.causes = self.earlier

    def update(self, states: Sequence[FileState]) -> None:
        """Add new changes of the files."""
        if self.files is None:
            return
        before, committed = self.changed, self.files.was_committed
        present, removed = frozenset(self.files.present), frozenset(self.files.removed)
        self.changed = ChangedPaths(
            (present | self.earlier.present) - removed, removed | (self.earlier.removed - present)
        )
        new, unusual = {state.path for state in states}, self.earlier.files | before.removed
        are_edits = all(state.mode and committed(state.path) for state in states) and unusual.isdisjoint(new)
        causes = self.changed.select_causes(new, before, are_edits=are_edits)
        self.causes = causes if self.causes is None else causes | self.causes
        self.pending.update((state.path, state) for state in states)

    @property
    def has_many_pending(self) -> bool:
        """Whether the pending changes take too much memory."""
        return sum(len(state.content) for state in self.pending.values()) > _MAX_PENDING

    def may_conflict(self, other: _Followed, renames: Mapping[str, str]) -> bool:
        """Return whether the result of a merge with another session may have changed since the last look.

        `renames` has the names of the same files in the bases of both.
        """
        return any(
            one.causes is not None
            and (
                one.causes.with_renames(renames).may_conflict(two.changed)
                or (two.causes is not None and one.causes.with_renames(renames).may_conflict(two.causes))
            )
            for one, two in ((self, other), (other, self))
        )

    def close(self) -> None:
        """Stop following the files. Blocks briefly."""
        if self.files is not None:
            self.files.close()
            self.files = None


class LiveConflicts:
    """The conflicts between sessions whose files it follows; call `close` when done."""

    def __init__(
        self,
        git: Git,
        trials: TrialMerges,
        conflicts: dict[SessionPair, frozenset[str]],
        *,
        watch_share: float = _WATCH_SHARE,
    ) -> None:
        """Update `conflicts`, the known conflicting paths of each pair, at each look.

        `git` runs in the trusted repository. `watch_share` is the maximum share of the user's inotify watches.
        """
        self._watch_share = watch_share
        self._git, self._trials, self.conflicts = git, trials, conflicts
        self._sessions: dict[SessionName, _Followed] = {}
        self._new: set[SessionName] = set()
        self._renames: dict[tuple[str, ...], Mapping[str, str]] = {}
        self._numbers = count(1)

    @property
    def sessions(self) -> Collection[SessionName]:
        """The followed sessions."""
        return self._sessions.keys()

    async def follow(
        self, name: SessionName, held: HeldSlot, rules: IntakeRules, base: str, start: str | None = None
    ) -> None:
        """Follow the files of a session, whose checkout starts at the commit `start` and lands on `base`."""
        earlier = ChangedPaths() if start is None else await self._changes(base, start)
        number = next(self._numbers)
        excludes = self._trials.folder / f"ignored-{number}"
        is_watched = await anyio.to_thread.run_sync(self._may_watch, len(held.contents.snapshot.folders))
        follow = partial(LiveFiles, self._trials.git, held, rules, excludes, is_watched=is_watched)
        files, commit = await anyio.to_thread.run_sync(follow), TrialCommit(start or base, start or base)
        self._sessions[name] = _Followed(number, files, base, commit, earlier)
        self._new.add(name)

    async def _changes(self, base: str, commit: str) -> ChangedPaths:
        changes = await self._git.changes(base, commit)
        removed = frozenset(change.path for change in changes if change.new_mode == MISSING_MODE)
        return ChangedPaths(frozenset(change.path for change in changes) - removed, removed)

    def freeze(self, name: SessionName) -> None:
        """Keep the known changes of a session that has ended. Blocks briefly."""
        self._sessions[name].close()

    async def follow_commit(self, name: SessionName, base: str, commit: str) -> None:
        """Compare the built work of a session that has ended, which lands on `base`, instead of its files."""
        known = self._sessions.get(name)
        if known is not None and known.commit.id == commit:
            return
        if known is not None:
            known.close()
        self._sessions[name] = _Followed(
            next(self._numbers), None, base, TrialCommit(commit, commit), await self._changes(base, commit)
        )
        self._new.add(name)

    def _may_watch(self, folders: int) -> bool:
        used = sum(one.files.watches for one in self._sessions.values() if one.files is not None)
        try:
            return used + folders <= int(_MAX_WATCHES.read_text()) * self._watch_share
        except (OSError, ValueError):  # no inotify
            return False

    def forget(self, name: SessionName) -> None:
        """Stop following a session, and forget its conflicts. Blocks briefly."""
        if (one := self._sessions.pop(name, None)) is not None:
            one.close()
        self._new.discard(name)
        for pair in [pair for pair in self.conflicts if name in pair]:
            del self.conflicts[pair]
        bases = {one.base for one in self._sessions.values()}
        self._renames = {pair: renames for pair, renames in self._renames.items() if bases.issuperset(pair)}

    def close(self) -> None:
        """Stop following all sessions. Blocks briefly."""
        for one in self._sessions.values():
            one.close()
        self._sessions.clear()

    async def look(self) -> Mapping[SessionPair, frozenset[str]]:
        """Return the pairs with other conflicting paths than before; their paths are empty if they merge cleanly.

        Raises GitError or OSError if git fails.
        """
        await self._read_changes()
        pairs = [pair for pair in combinations(sorted(self._sessions), 2) if await self._may_differ(*pair)]
        await self._commit_changes(set(chain.from_iterable(pairs)))
        self._new.clear()
        for one in self._sessions.values():
            one.causes = None
        found = dict(zip(pairs, await self._merge(pairs), strict=True))
        news = {pair: paths for pair, paths in found.items() if paths != self.conflicts.get(pair, frozenset())}
        for pair, paths in news.items():
            if paths:
                self.conflicts[pair] = paths
            else:
                del self.conflicts[pair]
        return news

    async def _may_differ(self, *pair: SessionName) -> bool:
        """Return whether other paths of a pair may conflict than at the last look."""
        one, other = (self._sessions[name] for name in pair)
        if one.causes is None and other.causes is None:
            return False
        renames = {} if one.base == other.base else await self._read_renames(one.base, other.base)
        return (pair in self.conflicts and not self._new.isdisjoint(pair)) or one.may_conflict(other, renames)

    async def _read_renames(self, *bases: str) -> Mapping[str, str]:
        """Return the names in one base of the files that have another name in the other one, in both directions."""
        if bases not in self._renames:
            moved = await self._git("diff-tree", "-r", "-z", "-M", "--diff-filter=R", "--name-status", *bases)
            fields = split_nul(moved.stdout)
            pairs = list(zip(fields[1::3], fields[2::3], strict=True))
            self._renames[bases] = dict([*pairs, *((new, old) for old, new in pairs)])
        return self._renames[bases]

    async def _read_changes(self) -> None:
        """Read the new changes of all sessions."""
        followed = [(one, one.files) for one in self._sessions.values() if one.files is not None]
        changed = await anyio.to_thread.run_sync(lambda: [(one, files) for one, files in followed if files.poll()])
        unwatched = sum(not files.watches for _, files in followed)
        for one, files in changed:
            if states := await files.read_changes(unwatched):
                one.update(states)

    async def _commit_changes(self, names: Collection[SessionName]) -> None:
        """Commit the pending changes of these sessions, and of those that have many."""
        found = [one for name, one in self._sessions.items() if one.pending and (name in names or one.has_many_pending)]
        commits = (
            await self._trials.commit([(one.number, one.commit, one.pending.values()) for one in found])
            if found
            else []
        )
        for one, commit in zip(found, commits, strict=True):
            one.commit = commit
            one.pending.clear()

    async def _merge(self, pairs: Sequence[SessionPair]) -> list[frozenset[str]]:
        """Return the conflicting paths of each pair; empty if its merge is clean.

        If the sessions started from different commits of the target, conflicts of one session with the target's own
        changes in between do not count.
        """
        sides = [(self._sessions[one], self._sessions[other]) for one, other in pairs]
        wanted: list[tuple[str, str]] = []
        for one, other in sides:
            wanted.append((one.commit.id, other.commit.id))
            wanted += [] if one.base == other.base else [(one.commit.id, other.base), (one.base, other.commit.id)]
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
